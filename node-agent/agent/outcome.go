package agent

import (
	"context"
	"errors"
	"strings"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// verdict is what is done about the end of an attempt.
type verdict int

const (
	giveBack verdict = iota // to the controller: the machine is not here
	retry                   // what was in the way may pass
	giveUp                  // it will not
	leave                   // the agent or the object is ending: nothing is written
)

// errTimeout is the cause with which a task ends whose time is over.
var errTimeout = errors.New("timeout")

// judge says what is done about an error, and the reason that conditions get.
func judge(ctx context.Context, err error) (verdict, string) {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errShutdown), errors.Is(cause, errDeleted):
		return leave, ""
	case errors.Is(cause, errTimeout):
		return giveUp, vmckptv1.ReasonTimeout
	}
	if gone := (*goneVMIError)(nil); errors.As(err, &gone) {
		return giveBack, vmckptv1.ReasonWaitingForVM
	}
	if volume := (*VolumeError)(nil); errors.As(err, &volume) {
		return retry, vmckptv1.ReasonClaim
	}
	code := jobs.CodeOf(err)
	switch code {
	case jobs.CodeNoVM: // KubeVirt says that it is here, or it would have been given back
		return retry, vmckptv1.ReasonVMGone
	case jobs.CodeState, jobs.CodeUnsteady, jobs.CodeBusy, jobs.CodeUnreachable, jobs.CodeDied, jobs.CodeNoAccess, jobs.CodeNoSpace,
		jobs.CodeNotFound, jobs.CodeKey, jobs.CodeInterrupted, jobs.CodeUnexpected, jobs.CodeLost, jobs.CodeStopped:
		return retry, reasonOf(code)
	}
	return giveUp, reasonOf(code)
}

// reasonOf makes the reason of a condition from a code: "no-space" is NoSpace.
func reasonOf(code jobs.Code) string {
	var b strings.Builder
	for part := range strings.SplitSeq(string(code), "-") {
		b.WriteString(strings.ToUpper(part[:1]))
		b.WriteString(part[1:])
	}
	return b.String()
}
