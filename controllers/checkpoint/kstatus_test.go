package checkpoint_test

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestKstatus is what GitOps tools see of our objects in each phase, by the rules that Flux and others go by.
func TestKstatus(t *testing.T) {
	r := newRig(t)
	sees := func(o client.Object, kind string, want status.Status) {
		t.Helper()
		seen := &unstructured.Unstructured{}
		seen.SetGroupVersionKind(vmckptv1.GroupVersion.WithKind(kind))
		r.must(r.Get(t.Context(), client.ObjectKeyFromObject(o), seen))
		got, err := status.Compute(seen)
		r.must(err)
		if got.Status != want {
			t.Errorf("%s %s is seen as %s (%s), want %s: %v", kind, o.GetName(), got.Status, got.Message, want, seen.Object["status"])
		}
	}
	c := r.checkpoint("first", nil)
	o := r.restore("back", "first", nil)
	sees(c, "VMCheckpoint", status.InProgressStatus) // nobody has looked at it yet
	sees(o, "VMRestore", status.InProgressStatus)

	r.controllers(false)
	r.says(c, vmckptv1.ReasonWaitingForVM, "")
	sees(c, "VMCheckpoint", status.InProgressStatus)
	r.says(o, vmckptv1.ReasonWaiting, "")
	sees(o, "VMRestore", status.InProgressStatus)
	r.claim("claim", "")
	r.instance("vm", nil)
	r.says(c, vmckptv1.ReasonBound, "")
	sees(c, "VMCheckpoint", status.InProgressStatus)
	r.agent(c, begun)
	sees(c, "VMCheckpoint", status.InProgressStatus)
	failed := r.checkpoint("failed", nil)
	r.says(failed, vmckptv1.ReasonBound, "")
	r.agent(failed, func(c *vmckptv1.VMCheckpoint) { c.Failed("Unexpected", "it failed", time.Now()) })
	sees(failed, "VMCheckpoint", status.FailedStatus)
	r.agent(c, captured)
	sees(c, "VMCheckpoint", status.CurrentStatus)

	r.says(o, vmckptv1.ReasonBound, "")
	sees(o, "VMRestore", status.InProgressStatus)
	o.SetMemoryInvalid(true, "half overwritten", time.Now())
	o.Waiting(vmckptv1.ReasonRetrying, "tried again", time.Now())
	r.must(r.Status().Update(t.Context(), o))
	sees(o, "VMRestore", status.InProgressStatus)
	o.Succeeded(vmckptv1.ReasonRestored, "restored", time.Now())
	r.must(r.Status().Update(t.Context(), o))
	sees(o, "VMRestore", status.CurrentStatus)

	r.must(r.Delete(t.Context(), c))
	sees(c, "VMCheckpoint", status.TerminatingStatus)
}
