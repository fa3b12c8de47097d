package v1alpha1_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

// The least that can be asked for.
const (
	checkpoint = `{apiVersion: vmckpt.io/v1alpha1, kind: VMCheckpoint, metadata: {name: NAME}, spec: {source: {name: web}, storage: {claimName: claim}}}`
	restore    = `{apiVersion: vmckpt.io/v1alpha1, kind: VMRestore, metadata: {name: NAME}, spec: {source: {checkpointName: first}, target: {name: web}}}`
)

// object makes an object of a manifest, with some of its fields changed: path: value, nil to remove.
func object(t *testing.T, manifest, namespace string, change map[string]any) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(strings.ReplaceAll(manifest, "NAME", "one")), &o.Object); err != nil {
		t.Fatal(err)
	}
	o.SetNamespace(namespace)
	for path, value := range change {
		fields := strings.Split(path, ".")
		if value == nil {
			unstructured.RemoveNestedField(o.Object, fields...)
		} else if err := unstructured.SetNestedField(o.Object, value, fields...); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

func long(n int) string { return strings.Repeat("a", n) }

// TestAccepted and refused: every rule and every bound of the specs, by what the API server says. An empty text means that it is taken.
func TestRules(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	for _, c := range []struct {
		manifest, path string
		value          any
		want           string
	}{
		{checkpoint, "spec.mode", "Full", ""},
		{checkpoint, "spec.mode", "Half", `Unsupported value: "Half"`},
		{checkpoint, "spec.instant", "Late", ""},
		{checkpoint, "spec.instant", "Never", "Unsupported value"},
		{checkpoint, "spec.compression", "S2", ""},
		{checkpoint, "spec.compression", "None", ""},
		{checkpoint, "spec.compression", "zip", "Unsupported value"},
		{checkpoint, "spec.deletionPolicy", "Retain", ""},
		{checkpoint, "spec.deletionPolicy", "Keep", "Unsupported value"},
		{checkpoint, "spec.source", nil, "spec.source: Required value"},
		{checkpoint, "spec.source.kind", "VirtualMachineInstance", ""},
		{checkpoint, "spec.source.kind", "Pod", "Unsupported value"},
		{checkpoint, "spec.source.name", "", "spec.source.name"},
		{checkpoint, "spec.source.name", long(253), ""},
		{checkpoint, "spec.source.name", long(254), "may not be more than 253"},
		{checkpoint, "spec.storage", nil, "spec.storage: Required value"},
		{checkpoint, "spec.storage.claimName", "", "spec.storage.claimName"},
		{checkpoint, "spec.storage.claimName", long(254), "may not be more than 253"},
		{checkpoint, "spec.timeout", "1s", ""},
		{checkpoint, "spec.timeout", "24h", ""},
		{checkpoint, "spec.timeout", "999ms", "timeout must be between 1s and 24h"},
		{checkpoint, "spec.timeout", "24h1s", "timeout must be between 1s and 24h"},
		{checkpoint, "spec.timeout", "-5m", "timeout must be between 1s and 24h"},
		{checkpoint, "spec.timeout", "soon", "spec.timeout"},
		{checkpoint, "spec.timeout", "1s" + strings.Repeat("1s", 20), "may not be more than 32"},
		{checkpoint, "spec.import", map[string]any{"image": "first.2"}, ""},
		{checkpoint, "spec.import", map[string]any{}, "spec.import.image: Required value"},
		{checkpoint, "spec.import", map[string]any{"image": "../first"}, "should match"},
		{checkpoint, "spec.import", map[string]any{"image": long(129)}, "may not be more than 128"},
		{checkpoint, "metadata.name", long(63), ""},
		{checkpoint, "metadata.name", long(64), "63 characters at the most"},
		{checkpoint, "spec.unknown", "x", `unknown field "spec.unknown"`},

		{restore, "spec.source", map[string]any{}, "name either a checkpoint or an image on a volume"},
		{restore, "spec.source.volume", map[string]any{"claimName": "claim", "image": "first"}, "name either a checkpoint or an image on a volume"},
		{restore, "spec.source", map[string]any{"volume": map[string]any{"claimName": "claim", "image": "first"}}, ""},
		{restore, "spec.source", map[string]any{"volume": map[string]any{"claimName": "claim"}}, "spec.source.volume.image: Required value"},
		{restore, "spec.source", map[string]any{"volume": map[string]any{"image": "first"}}, "spec.source.volume.claimName: Required value"},
		{restore, "spec.source", map[string]any{"volume": map[string]any{"claimName": "claim", "image": "a/b"}}, "should match"},
		{restore, "spec.source", map[string]any{"volume": map[string]any{"claimName": long(254), "image": "a"}}, "may not be more than 253"},
		{restore, "spec.source.checkpointName", "", "spec.source.checkpointName"},
		{restore, "spec.source.checkpointName", long(254), "may not be more than 253"},
		{restore, "spec.target", nil, "spec.target: Required value"},
		{restore, "spec.target.name", "", "spec.target.name"},
		{restore, "spec.target.name", long(254), "may not be more than 253"},
		{restore, "spec.target.kind", "Pod", "Unsupported value"},
		{restore, "spec.target.mode", "InPlace", ""},
		{restore, "spec.target.mode", "Anywhere", "Unsupported value"},
		{restore, "spec.after", "Pause", ""},
		{restore, "spec.after", "Stop", "Unsupported value"},
		{restore, "spec.timeout", "10ms", "timeout must be between 1s and 24h"},
		{restore, "spec.timeout", "25h", "timeout must be between 1s and 24h"},
		{restore, "metadata.name", long(64), "63 characters at the most"},
	} {
		text := fmt.Sprintf("%v", c.value)
		if len(text) > 40 {
			text = text[:40]
		}
		o := object(t, c.manifest, namespace, map[string]any{c.path: c.value})
		t.Run(o.GetKind()+" "+c.path+" "+text, func(t *testing.T) {
			err := admin.Create(t.Context(), o, client.DryRunAll, client.FieldValidation("Strict"))
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	full := object(t, checkpoint, namespace, map[string]any{"spec.import": map[string]any{"image": "first"}, "spec.mode": "Full"})
	if err := admin.Create(t.Context(), full, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "leave mode out") {
		t.Errorf("an import with a mode: %v", err)
	}
}

// TestDefaults are what the docs say.
func TestDefaults(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	c := &v1alpha1.VMCheckpoint{}
	c.Namespace, c.Name, c.Spec.Source.Name, c.Spec.Storage.ClaimName = namespace, "one", "web", "claim"
	if err := admin.Create(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if s := c.Spec; s.Source.Kind != v1alpha1.KindVirtualMachine || s.Mode != v1alpha1.ModeAuto || s.Instant != v1alpha1.InstantLate ||
		s.Compression != v1alpha1.CompressionZstd || s.DeletionPolicy != v1alpha1.DeletionDelete || s.Timeout.Duration != 30*time.Minute {
		t.Errorf("%+v", s)
	}
	r := &v1alpha1.VMRestore{}
	r.Namespace, r.Name, r.Spec.Source.CheckpointName, r.Spec.Target.Name = namespace, "one", "first", "web"
	if err := admin.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if s := r.Spec; s.Target.Kind != v1alpha1.KindVirtualMachine || s.Target.Mode != v1alpha1.RestorePaused || s.After != v1alpha1.AfterRun || s.Timeout.Duration != 30*time.Minute {
		t.Errorf("%+v", s)
	}
}

// TestSpecsStay as they were made; applied again, nothing changes.
func TestSpecsStay(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	for manifest, changes := range map[string]map[string]any{
		checkpoint: {"spec.mode": "Full", "spec.source.name": "other", "spec.timeout": "1m", "spec.deletionPolicy": "Retain", "spec.import": map[string]any{"image": "x"}},
		restore:    {"spec.target.name": "other", "spec.after": "Pause", "spec.timeout": "1m", "spec.source.checkpointName": "other"},
	} {
		apply := func(change map[string]any) (*unstructured.Unstructured, error) {
			o := object(t, manifest, namespace, change)
			return o, admin.Apply(t.Context(), client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("gitops"), client.ForceOwnership)
		}
		// The status that an object begins with is stored by the second write, if the controller's is not that.
		if _, err := apply(nil); err != nil {
			t.Fatal(err)
		}
		first, err := apply(nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := apply(nil)
		if err != nil || again.GetResourceVersion() != first.GetResourceVersion() {
			t.Errorf("applied again: %s after %s: %v", again.GetResourceVersion(), first.GetResourceVersion(), err)
		}
		for path, value := range changes {
			if _, err := apply(map[string]any{path: value}); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "cannot be changed") {
				t.Errorf("%s of a %s was changed: %v", path, first.GetKind(), err)
			}
		}
		// What is not the spec can be.
		if _, err := apply(map[string]any{"metadata.labels": map[string]any{"a": "b"}}); err != nil {
			t.Errorf("a label: %v", err)
		}
	}
}

// TestColumns of kubectl get.
func TestColumns(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	for _, manifest := range []string{checkpoint, restore} {
		if err := admin.Create(t.Context(), object(t, manifest, namespace, nil)); err != nil {
			t.Fatal(err)
		}
	}
	for kind, want := range map[string]string{
		"vmckpt": "NAME VM PHASE SIZE PAUSE PARENT NODE AGE",
		"vmrest": "NAME VM PHASE IMAGE TOOK NODE AGE",
	} {
		head, _, _ := strings.Cut(server.Kubectl(t, "get", kind, "--namespace", namespace), "\n")
		if got := strings.Join(strings.Fields(head), " "); got != want {
			t.Errorf("%s: %s", kind, got)
		}
	}
	if got := server.Kubectl(t, "explain", "vmcheckpoint.spec.deletionPolicy"); !strings.Contains(got, "Retain leaves it") {
		t.Errorf("explain: %s", got)
	}
}
