package cached_test

import (
	"os"
	"testing"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/cached"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	os.Exit(shared.Main(m))
}

// TestDrops what nobody looks at, and writes of what was read so harm nothing on the server.
func TestDrops(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	server.InstallKubeVirt(t)
	admin, namespace := server.Client(t), server.Namespace(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "vm", Annotations: map[string]string{"a": "b"}}}
	vmi.Spec.Volumes = []kubevirtv1.Volume{{Name: "disk"}}
	vmi.Spec.Domain.Devices.GPUs = []kubevirtv1.GPU{{Name: "gpu"}}
	vmi.Status.NodeName = "node"
	must(admin.Create(t.Context(), vmi))
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: namespace, Annotations: map[string]string{"a": "b"}}}
	must(admin.Create(t.Context(), node))
	node.Status.Images = []corev1.ContainerImage{{Names: []string{"image"}}}
	must(admin.Status().Update(t.Context(), node))
	made := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "first"}}
	made.Spec.Source.Name, made.Spec.Storage.ClaimName = "vm", "claim"
	must(admin.Create(t.Context(), made))

	options := cached.Options()
	options.Scheme = admin.Scheme()
	reader, err := cache.New(server.Config(), options)
	must(err)
	go reader.Start(t.Context()) //nolint:errcheck // shows in what is read
	if !reader.WaitForCacheSync(t.Context()) {
		t.Fatal("the cache does not start")
	}
	key := client.ObjectKey{Namespace: namespace, Name: "vm"}
	must(reader.Get(t.Context(), key, vmi))
	if vmi.ManagedFields != nil || vmi.Annotations != nil || vmi.Spec.Volumes != nil {
		t.Errorf("it is kept: %+v", vmi)
	}
	if len(vmi.Spec.Domain.Devices.GPUs) != 1 || vmi.Status.NodeName != "node" || vmi.UID == "" {
		t.Errorf("it is dropped: %+v", vmi)
	}
	must(reader.Get(t.Context(), client.ObjectKeyFromObject(node), node))
	if node.ManagedFields != nil || node.Annotations != nil || node.Status.Images != nil {
		t.Errorf("it is kept: %+v", node)
	}
	c := &vmckptv1.VMCheckpoint{}
	must(reader.Get(t.Context(), client.ObjectKeyFromObject(made), c))
	if c.ManagedFields != nil || c.Spec != made.Spec {
		t.Errorf("%+v", c)
	}
	c.Waiting(vmckptv1.ReasonWaiting, "waits", made.CreationTimestamp.Time)
	must(admin.Status().Update(t.Context(), c))
	if len(c.ManagedFields) != 2 { // whoever made it, and whoever wrote the status
		t.Errorf("on the server: %+v", c.ManagedFields)
	}
}
