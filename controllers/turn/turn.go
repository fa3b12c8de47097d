// Package turn says which restores of a machine others wait for.
package turn

import (
	"k8s.io/apimachinery/pkg/api/meta"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// Waits reports whether a restore that is bound to no node waits for something beside its machine, its node and its turn: a claim or a checkpoint
// may never come, and nobody else is to wait for that.
func Waits(o *vmckptv1.VMRestore) bool {
	switch reason(o) {
	case vmckptv1.ReasonClaim, vmckptv1.ReasonWaiting:
		return o.Status.NodeName == ""
	}
	return false
}

// Retries reports whether an agent tries a restore again later, the last attempt having left the machine as it was.
func Retries(o *vmckptv1.VMRestore) bool {
	return o.Status.NodeName != "" && reason(o) == vmckptv1.ReasonRetrying && !o.Unfinished()
}

// Endless reports whether it does so for as long as the repository is missing. The time of such a restore does not run: its agent takes the start
// back after each attempt.
func Endless(o *vmckptv1.VMRestore) bool { return Retries(o) && o.Status.StartTime == nil }

func reason(o *vmckptv1.VMRestore) string {
	ready := meta.FindStatusCondition(o.Status.Conditions, vmckptv1.ConditionReady)
	if ready == nil {
		return ""
	}
	return ready.Reason
}
