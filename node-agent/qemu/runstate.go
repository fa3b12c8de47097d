package qemu

import (
	"context"
	"fmt"
)

// RunState is QEMU's own word for what the VM does (QEMU, qapi/run-state.json).
type RunState string

// The run states of QEMU 4 to 10.
const (
	StateDebug         RunState = "debug"
	StateFinishMigrate RunState = "finish-migrate"
	StateInMigrate     RunState = "inmigrate"
	StateInternalError RunState = "internal-error"
	StateIOError       RunState = "io-error"
	StatePaused        RunState = "paused"
	StatePostMigrate   RunState = "postmigrate"
	StatePrelaunch     RunState = "prelaunch"
	StateRestoreVM     RunState = "restore-vm"
	StateRunning       RunState = "running"
	StateSaveVM        RunState = "save-vm"
	StateShutdown      RunState = "shutdown"
	StateSuspended     RunState = "suspended"
	StateWatchdog      RunState = "watchdog"
	StateGuestPanicked RunState = "guest-panicked"
	StateColo          RunState = "colo"
	StatePreconfig     RunState = "preconfig"
)

// Status asks for the run state.
func Status(ctx context.Context, m Monitor) (RunState, error) {
	var r struct {
		Status RunState `json:"status"`
	}
	if err := m.Execute(ctx, "query-status", nil, &r); err != nil {
		return "", fmt.Errorf("ask for the run state: %w", err)
	}
	return r.Status, nil
}

// MigrationStatus is where an outgoing or incoming migration stands (QEMU, qapi/migration.json). The empty one means that
// there never was one.
type MigrationStatus string

// The migration statuses of QEMU 4 to 10.
const (
	MigrationNone            MigrationStatus = "none"
	MigrationSetup           MigrationStatus = "setup"
	MigrationCancelling      MigrationStatus = "cancelling"
	MigrationCancelled       MigrationStatus = "cancelled"
	MigrationActive          MigrationStatus = "active"
	MigrationPostcopyActive  MigrationStatus = "postcopy-active"
	MigrationPostcopyPaused  MigrationStatus = "postcopy-paused"
	MigrationPostcopyRecover MigrationStatus = "postcopy-recover"
	MigrationCompleted       MigrationStatus = "completed"
	MigrationFailed          MigrationStatus = "failed"
	MigrationColo            MigrationStatus = "colo"
	MigrationPreSwitchover   MigrationStatus = "pre-switchover"
	MigrationDevice          MigrationStatus = "device"
	MigrationWaitUnplug      MigrationStatus = "wait-unplug"
)

// Idle reports whether no migration is under way and none has taken the VM away: only then is the VM this QEMU's own.
// A status that is not known is not idle.
func (s MigrationStatus) Idle() bool {
	switch s {
	case "", MigrationNone, MigrationFailed, MigrationCancelled:
		return true
	}
	return false
}

// MigrationState is the answer of query-migrate.
type MigrationState struct {
	Status  MigrationStatus
	Blocked []string // why QEMU refuses to migrate; xen-save-devices-state does not ask, so a capture must
}

// Migration asks how a migration stands and what blocks one.
func Migration(ctx context.Context, m Monitor) (MigrationState, error) {
	var r struct {
		Status  MigrationStatus `json:"status"`
		Blocked []string        `json:"blocked-reasons"`
	}
	if err := m.Execute(ctx, "query-migrate", nil, &r); err != nil {
		return MigrationState{}, fmt.Errorf("ask for the migration's state: %w", err)
	}
	return MigrationState{Status: r.Status, Blocked: r.Blocked}, nil
}
