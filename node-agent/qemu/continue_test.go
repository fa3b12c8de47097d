package qemu

import "testing"

var allStates = []RunState{
	StateDebug, StateFinishMigrate, StateInMigrate, StateInternalError, StateIOError, StatePaused, StatePostMigrate,
	StatePrelaunch, StateRestoreVM, StateRunning, StateSaveVM, StateShutdown, StateSuspended, StateWatchdog,
	StateGuestPanicked, StateColo, StatePreconfig, "", "a state of the future",
}

var allMigrations = []MigrationStatus{
	"", MigrationNone, MigrationSetup, MigrationCancelling, MigrationCancelled, MigrationActive, MigrationPostcopyActive,
	MigrationPostcopyPaused, MigrationPostcopyRecover, MigrationCompleted, MigrationFailed, MigrationColo,
	MigrationPreSwitchover, MigrationDevice, MigrationWaitUnplug, "a status of the future",
}

// Of all combinations four may continue; they are written out here, and everything else may not.
func TestMayContinue(t *testing.T) {
	may := map[Standstill]bool{
		{StateRunning, StatePaused, ""}:                 true,
		{StateRunning, StatePaused, MigrationNone}:      true,
		{StateRunning, StatePaused, MigrationFailed}:    true,
		{StateRunning, StatePaused, MigrationCancelled}: true,
	}
	for _, before := range allStates { // "" is a stop that was not ours
		for _, now := range allStates {
			for _, migration := range allMigrations {
				s := Standstill{before, now, migration}
				ok, why := MayContinue(s)
				if ok != may[s] || ok == (why != "") {
					t.Errorf("%+v: %v, %q", s, ok, why)
				}
			}
		}
	}
}
