package restore

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

var (
	// ErrNotPaused: the machine runs, and may not be stopped. Nothing was touched.
	ErrNotPaused = errors.New("the machine is running")

	// ErrResumed: somebody else resumed the machine during the restore.
	ErrResumed = errors.New("the machine was resumed by somebody else")

	// ErrMigrating: somebody else has begun to migrate the machine during the restore.
	ErrMigrating = errors.New("a migration of the machine was begun by somebody else")
)

// StateError says that the machine is in a state in which it cannot be restored into, or continued. Running machines are an [ErrNotPaused].
type StateError struct {
	State     qemu.RunState
	Migration qemu.MigrationStatus
}

func (e *StateError) Error() string {
	if !e.Migration.Idle() {
		return fmt.Sprintf("the machine's migration is %q, and its run state %q", e.Migration, e.State)
	}
	if e.State == qemu.StateRunning {
		return ErrNotPaused.Error()
	}
	return fmt.Sprintf("the machine's run state is %q", e.State)
}

// Is makes the error of a running machine an [ErrNotPaused].
func (e *StateError) Is(target error) bool {
	return target == ErrNotPaused && e.State == qemu.StateRunning && e.Migration.Idle()
}

// MismatchError says that the image is of another machine, with all that differs. Nothing was touched.
type MismatchError struct {
	Image   string
	Machine []qemu.Difference
	Blocks  []BlockDifference
}

// BlockDifference is a RAM block that is not the same in the image and in the machine.
type BlockDifference struct {
	Name    string
	Image   uint64 // bytes; 0: has no such block
	Present uint64 // bytes; 0: has no such block
}

func (d BlockDifference) String() string {
	switch {
	case d.Present == 0:
		return fmt.Sprintf("RAM block %q of %d bytes is missing", d.Name, d.Image)
	case d.Image == 0:
		return fmt.Sprintf("RAM block %q of %d bytes is not in the image", d.Name, d.Present)
	}
	return fmt.Sprintf("RAM block %q has %d bytes, %d in the image", d.Name, d.Present, d.Image)
}

func (e *MismatchError) Error() string {
	var all []string
	for _, d := range e.Machine {
		all = append(all, d.String())
	}
	for _, d := range e.Blocks {
		all = append(all, d.String())
	}
	return fmt.Sprintf("image %s is of another machine: %s", e.Image, strings.Join(all, "; "))
}

// DifferenceError says that memory is not as the image says, after it was put in more than once: something writes to the standing machine.
type DifferenceError struct {
	Image  string
	Blocks []BlockPages
}

func (e *DifferenceError) Error() string {
	var all []string
	for _, b := range e.Blocks {
		first := pageset.Run{}
		if len(b.Runs) > 0 {
			first = b.Runs[0]
		}
		all = append(all, fmt.Sprintf("%d pages of block %s, first %v", b.Pages, b.Block, first))
	}
	return fmt.Sprintf("memory differs from image %s after the load: %s", e.Image, strings.Join(all, "; "))
}

// InvalidMemoryError says that a restore has begun to write a machine's memory and has not finished: the machine must not run. The next restore
// finishes it.
type InvalidMemoryError struct {
	Mark Mark
	Err  error // what ended the restore; nil where the mark was found
}

func (e *InvalidMemoryError) Error() string {
	what := fmt.Sprintf("memory of %v is invalid since %s: restore of image %s ended in phase %q, and has to be repeated",
		e.Mark.Process, e.Mark.Since.Format(time.RFC3339), e.Mark.Image.Name, e.Mark.Phase)
	if e.Err != nil {
		return fmt.Sprintf("%v (%s)", e.Err, what)
	}
	return what
}

// Unwrap returns what ended the restore.
func (e *InvalidMemoryError) Unwrap() error { return e.Err }

// StoppedError says that a restore stopped a machine which ran, wrote nothing to it, and could not let it go on: it stands still, with its own memory.
type StoppedError struct {
	Err error // what ended the restore
	Why error // what kept the machine from going on
}

func (e *StoppedError) Error() string {
	return fmt.Sprintf("%v; the machine, stopped for the restore and not written to, was not continued: %v", e.Err, e.Why)
}

// Unwrap returns what ended the restore.
func (e *StoppedError) Unwrap() error { return e.Err }

// RestoredError says that the machine is restored, its memory whole and its own, and does not run though it was to.
type RestoredError struct{ Err error }

func (e *RestoredError) Error() string {
	return fmt.Sprintf("the machine is restored and whole, but not running: %v", e.Err)
}

// Unwrap returns what kept it from running.
func (e *RestoredError) Unwrap() error { return e.Err }
