package capture

import (
	"errors"
	"fmt"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// ErrNoParent says that an increment was asked for and there is nothing that it could be made on.
var ErrNoParent = errors.New("there is no image to make an increment on")

// ErrStopped says that the machine is in a state in which it cannot be captured: it is neither running nor paused by its owner.
var ErrStopped = errors.New("the machine is neither running nor paused")

// ErrMigrating says that a migration is under way, or has taken the machine away.
var ErrMigrating = errors.New("a migration is under way")

// errDisturbed: somebody else stopped or started the machine around the instant.
var errDisturbed = errors.New("somebody else stopped or resumed the machine meanwhile")

// errChanged: the machine's memory or devices are not those of the preparation.
var errChanged = errors.New("the machine changed meanwhile")

// errNoAnswer: QEMU does not answer a command that nothing of ours holds up any more.
var errNoAnswer = errors.New("QEMU does not answer")

// StateError tells the state in which the machine cannot be captured. It is an [ErrStopped].
type StateError struct{ State qemu.RunState }

func (e *StateError) Error() string {
	return fmt.Sprintf("%v: its state is %q", ErrStopped, string(e.State))
}

func (e *StateError) Is(target error) bool { return target == ErrStopped }

// AttemptsError says that the instant could not be held in any of its attempts. The machine runs.
type AttemptsError struct {
	Attempts int
	Last     error
}

func (e *AttemptsError) Error() string {
	if e.Attempts == 1 {
		return fmt.Sprintf("the machine could not be held for its instant: %v", e.Last)
	}
	return fmt.Sprintf("the machine could not be held for its instant in %d attempts, last: %v", e.Attempts, e.Last)
}

func (e *AttemptsError) Unwrap() error { return e.Last }

// BoundError says that a hold took longer than it may: the machine was let go before its instant was whole. It is a [guard.ErrLetGo].
type BoundError struct{ Bound time.Duration }

func (e *BoundError) Error() string {
	return fmt.Sprintf("the hold took longer than its bound of %v, and the machine was let go", e.Bound)
}

func (e *BoundError) Is(target error) bool { return target == guard.ErrLetGo }

// ResidueError says that the guest writes faster than its memory can be copied: what was left to be copied in the hold would have
// taken longer than the pause may.
type ResidueError struct {
	Pages uint64
	Bound time.Duration
}

func (e *ResidueError) Error() string {
	return fmt.Sprintf("the guest writes faster than it can be copied: %d MiB were left to copy in the pause, more than its bound of %v allows",
		e.Pages*pageset.PageBytes>>20, e.Bound)
}
