package checkpoint_test

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// TestPassedBy are restores that cannot be done now, for want of a claim or of an image, and have not touched the machine.
func TestPassedBy(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.patience = 20 * time.Second // less than a look once a minute would take
	r.claim("claim", "")
	r.instance("vm", nil)
	from := func(claim string) func(*vmckptv1.VMRestore) {
		return func(o *vmckptv1.VMRestore) { o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: claim, Image: "old"} }
	}
	stuck := r.restore("stuck", "", from("missing"))
	r.says(stuck, vmckptv1.ReasonClaim, "is not there")
	r.says(r.checkpoint("first", nil), vmckptv1.ReasonBound, "")
	back := r.restore("back", "", from("claim"))
	r.says(back, vmckptv1.ReasonBound, "")

	// What an agent tries again later, and has not begun to write, lets checkpoints pass; other restores only where no time runs.
	second := r.checkpoint("second", nil)
	r.says(second, vmckptv1.ReasonRestoring, "restore back")
	third := r.restore("third", "", from("claim"))
	r.says(third, vmckptv1.ReasonRestoring, "restore back")
	retries := func(start *metav1.Time) {
		r.must(r.Get(t.Context(), client.ObjectKeyFromObject(back), back))
		back.Status.StartTime, back.Status.Attempts = start, 1
		back.Waiting(vmckptv1.ReasonRetrying, "attempt 1: not found; tried again in 10s", time.Now())
		r.must(r.Status().Update(t.Context(), back))
	}
	retries(&metav1.Time{Time: time.Now()})
	r.says(second, vmckptv1.ReasonRestoring, "restore third") // which is next
	r.must(r.Delete(t.Context(), third))
	r.gone(third)
	r.says(second, vmckptv1.ReasonBound, "")
	fourth := r.restore("fourth", "", from("claim"))
	r.says(fourth, vmckptv1.ReasonRestoring, "restore back")
	retries(nil)
	r.says(fourth, vmckptv1.ReasonBound, "")
	fourth.Succeeded(vmckptv1.ReasonRestored, "restored", time.Now())
	r.must(r.Status().Update(t.Context(), fourth))

	// One that has begun to write holds all.
	r.must(r.Get(t.Context(), client.ObjectKeyFromObject(back), back))
	back.SetMemoryInvalid(true, "half overwritten", time.Now())
	r.must(r.Status().Update(t.Context(), back))
	r.says(r.checkpoint("fifth", nil), vmckptv1.ReasonRestoring, "restore back")
	r.says(r.restore("sixth", "", from("claim")), vmckptv1.ReasonRestoring, "restore back")
}
