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
	r.claim("claim", "")
	for i, timeout := range []string{"", `, "timeout": "10m"`, `, "timeout": "10m0s"`} {
		name := fmt.Sprintf("c%d", i)
		r.instance(name, nil)
		r.instance(name+"-back", nil)
		manifests := map[client.Object]string{
			&vmckptv1.VMCheckpoint{}: `"kind": "VMCheckpoint", "spec": {"source": {"kind": "VirtualMachineInstance", "name": "` + name + `"}, "storage": {"claimName": "claim"}` + timeout,
			&vmckptv1.VMRestore{}:    `"kind": "VMRestore", "spec": {"source": {"volume": {"claimName": "claim", "image": "old"}}, "target": {"kind": "VirtualMachineInstance", "name": "` + name + `-back", "mode": "InPlace"}` + timeout,
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
			r.wait(o, "the finalizer and a node", func() bool {
				switch o := o.(type) {
				case *vmckptv1.VMCheckpoint:
					return len(o.Finalizers) == 1 && o.Status.NodeName != ""
				case *vmckptv1.VMRestore:
					return len(o.Finalizers) == 1 && o.Status.NodeName != ""
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
