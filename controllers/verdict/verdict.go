// Package verdict says what stands between a request and its node.
package verdict

import (
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
)

// Verdict is what a check found in the way, in the words of a condition. A nil one means that nothing is.
type Verdict struct {
	Reason  string // of a condition
	Message string
	Final   bool // it will not pass: the request fails
}

// Wait is a verdict of what may pass.
func Wait(reason, message string) *Verdict { return &Verdict{Reason: reason, Message: message} }

// Refuse is a verdict of what will not.
func Refuse(reason, message string) *Verdict {
	return &Verdict{Reason: reason, Message: message, Final: true}
}

// noteBytes bounds the note of an event: the API server refuses an event with a longer one (1 KiB, k8s.io/api/events/v1).
const noteBytes = 1024

// Note is a message as an event can carry it, cut at a whole character.
func Note(message string) string {
	const mark = " …"
	if len(message) <= noteBytes {
		return message
	}
	cut := noteBytes - len(mark)
	for cut > 0 && !utf8.RuneStart(message[cut]) {
		cut--
	}
	return message[:cut] + mark
}

// againAfter gives the cache the time to show what another has written.
const againAfter = 200 * time.Millisecond

// Later is the error of who has nothing to say yet, and is to look again after that time.
type Later time.Duration

func (l Later) Error() string { return fmt.Sprintf("to be looked at again in %v", time.Duration(l)) }

// agentsTurn is how long the agent of a deleted object has to itself. Mostly it is done by then, and a write of ours would only get in its way.
const agentsTurn = 2 * time.Second

// AgentsTurn is [Later] as long as an object was deleted a moment ago. Clocks that disagree do not make it longer.
func AgentsTurn(deleted, now time.Time) error {
	if left := agentsTurn - now.Sub(deleted); left > 0 && left <= agentsTurn {
		return Later(left)
	}
	return nil
}

// Again is what a reconciler returns. That another wrote in between is no error: the object is looked at again.
func Again(err error) (ctrl.Result, error) {
	if later := Later(0); errors.As(err, &later) {
		return ctrl.Result{RequeueAfter: time.Duration(later)}, nil
	}
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: againAfter}, nil
	}
	return ctrl.Result{}, err
}
