package checkpoint_test

import (
	"fmt"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestOlderRestoreFirst also where the controllers come to know of both in the same moment.
func TestOlderRestoreFirst(t *testing.T) {
	const machines = 40
	r := newRig(t)
	r.claim("claim", "")
	for i := range machines {
		name := fmt.Sprintf("vm%02d", i)
		r.instance(name, nil)
		for _, order := range []string{"-older", "-younger"} {
			r.restore(name+order, "", func(o *vmckptv1.VMRestore) {
				o.Spec.Target.Name = name
				o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}
			})
		}
	}
	r.controllers(false)
	var list vmckptv1.VMRestoreList
	last := &vmckptv1.VMRestore{}
	last.Namespace, last.Name = r.namespace, fmt.Sprintf("vm%02d-younger", machines-1)
	r.wait(last, "a word on each", func() bool {
		r.must(r.List(t.Context(), &list, client.InNamespace(r.namespace)))
		for i := range list.Items {
			if len(list.Items[i].Status.Conditions) == 0 {
				return false
			}
		}
		return true
	})
	for i := range list.Items {
		o := &list.Items[i]
		if older := o.Name == o.Spec.Target.Name+"-older"; older != (o.Status.NodeName != "") {
			t.Errorf("restore %s: %s", o.Name, o.Status.Conditions[0].Message)
		}
	}
}
