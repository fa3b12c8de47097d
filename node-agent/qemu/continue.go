package qemu

import "fmt"

// Standstill is what is known of a VM that stands still.
type Standstill struct {
	// Before is the run state out of which our own `stop` took the VM; "" where it was not our stop that did.
	Before RunState
	// Now is the run state.
	Now RunState
	// Migration is where a migration stands.
	Migration MigrationStatus
}

// MayContinue is the rule for `cont`: whether we may wake a VM that stands still, and if not, why. A VM that its owner
// paused, that has gone to another machine, or that stands because something went wrong is not ours to wake: the guest
// would run twice, or run on with a disk that failed.
//
// Asking and waking are two commands, so the answer holds only while nobody else acts; where that cannot be had, the VM
// belongs on the leash, which needs no `cont`.
func MayContinue(s Standstill) (ok bool, why string) {
	switch {
	case s.Before == "":
		return false, "it was not stopped by us"
	case s.Before != StateRunning:
		return false, fmt.Sprintf("it was %s, not running, when we stopped it", s.Before)
	case s.Now == StateRunning:
		return false, "it is running already"
	case s.Now != StatePaused:
		// A stop of ours leads to paused. Any other state, known or not, is the mark of somebody or something else.
		return false, fmt.Sprintf("it is %s, not paused", s.Now)
	case !s.Migration.Idle():
		return false, fmt.Sprintf("a migration is %s", s.Migration)
	}
	return true, ""
}
