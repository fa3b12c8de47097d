package checkpoint_test

import (
	"fmt"
	"testing"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestAppliedAgain with the controllers at work, a manifest changes nothing and meets no conflict, however it spells its timeout.
func TestAppliedAgain(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	for i, timeout := range []string{"", `, "timeout": "10m"`, `, "timeout": "10m0s"`} {
		name := fmt.Sprintf("c%d", i)
		manifests := map[client.Object]string{
			&vmckptv1.VMCheckpoint{}: `"kind": "VMCheckpoint", "spec": {"source": {"name": "vm"}, "storage": {"claimName": "claim"}` + timeout,
			&vmckptv1.VMRestore{}:    `"kind": "VMRestore", "spec": {"source": {"checkpointName": "none"}, "target": {"name": "vm"}` + timeout,
		}
		for o, text := range manifests {
			text = fmt.Sprintf(`{"apiVersion": "vmckpt.io/v1alpha1", "metadata": {"name": %q}, %s}}`, name, text)
			o.SetNamespace(r.namespace)
			o.SetName(name)
			apply := func() {
				if err := r.Patch(t.Context(), o, client.RawPatch(types.ApplyPatchType, []byte(text)), client.FieldOwner("gitops")); err != nil {
					t.Fatalf("apply %s: %v", text, err)
				}
			}
			apply()
			r.wait(o, "the finalizer and a word", func() bool {
				switch o := o.(type) {
				case *vmckptv1.VMCheckpoint:
					return len(o.Finalizers) == 1 && len(o.Status.Conditions) != 0
				case *vmckptv1.VMRestore:
					return len(o.Finalizers) == 1 && len(o.Status.Conditions) != 0
				}
				return false
			})
			before := o.GetResourceVersion()
			apply()
			if o.GetResourceVersion() != before {
				t.Errorf("applied again, it changed: %s", text)
			}
		}
	}
}
