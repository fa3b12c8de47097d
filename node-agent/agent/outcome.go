package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

// unfitError says that an image is not one that the object can have.
type unfitError struct{ reason, text string }

func (e *unfitError) Error() string { return e.text }

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
	if unfit := (*unfitError)(nil); errors.As(err, &unfit) {
		return giveUp, unfit.reason
	}
	code := jobs.CodeOf(err)
	switch code {
	case jobs.CodeNoVM: // KubeVirt says that it is here, or it would have been given back
		return retry, vmckptv1.ReasonVMGone
	case jobs.CodeNoRepository:
		return retry, vmckptv1.ReasonClaim
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

// attempt is one that came to nothing.
type attempt struct {
	number  int32
	start   *metav1.Time // of the first
	timeout metav1.Duration

	// endless says that it is not given up for want of time.
	endless bool
}

// failure is what is done about it, and what is said.
type failure struct {
	verdict
	reason  string // what was in the way
	message string
}

// errNoVM is what is told of a machine that was not found.
var errNoVM = errors.New("no QEMU of this virtual machine runs on the node")

// told is what objects may say of an error: whoever reads them has no business with the node's other machines, which the log may name.
func told(err error) error {
	if jobs.CodeOf(err) == jobs.CodeNoVM {
		return errNoVM
	}
	return err
}

// weigh decides, and notes when the object is tried again.
func (a *Agent) weigh(ctx context.Context, key taskKey, t attempt, err error) failure {
	f := failure{}
	f.verdict, f.reason = judge(ctx, err)
	err = told(err)
	if f.reason == vmckptv1.ReasonTimeout {
		err = a.retries.timedOut(key, t.timeout.Duration, err)
	}
	var wait time.Duration
	if f.verdict == retry {
		wait = a.retries.after(key, err, a.o.Clock.Now(), a.o.RetryAfter)
		if !t.endless && wait > timeLeft(t.start, t.timeout, a.o.Clock.Now()) {
			f.verdict = giveUp
			err = fmt.Errorf("%w; there is no time left for another attempt (timeout %v)", err, t.timeout.Duration)
		}
	}
	switch f.verdict {
	case giveBack:
		f.message = err.Error() + "; the virtual machine is waited for"
	case retry:
		f.message = fmt.Sprintf("attempt %d: %v; tried again in %v", t.number, err, wait.Round(time.Second))
	case giveUp:
		f.message = fmt.Sprintf("attempt %d: %v", t.number, err)
	}
	return f
}

// tell puts it into an object's conditions.
func (f failure) tell(o object, now time.Time) {
	switch f.verdict {
	case giveBack:
		o.Waiting(f.reason, f.message, now)
	case retry:
		o.Waiting(vmckptv1.ReasonRetrying, f.message, now)
	case giveUp:
		o.Failed(f.reason, f.message, now)
	}
}
