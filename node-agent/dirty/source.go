package dirty

import (
	"context"
	"errors"
)

// ErrUntracked: a source cannot tell what was written since it last reported, and will not be able to for what lies
// behind: nothing of the past is known. [Union] answers it with every page.
var ErrUntracked = errors.New("writes are not tracked")

// Standstill is a time in which nothing can write guest memory: no vCPU runs, I/O is drained, QEMU's main loop does
// not run. The holder of the leash is one.
type Standstill interface {
	// Err is nil as long as the standstill that the value stands for has not been broken or ended. Once it is an error it
	// stays one.
	Err() error
}

// Source tells which pages were written since it last reported them as it re-armed.
//
// A page in a report of a re-arming call is gone from the source: the caller must not drop it. That is why [Union],
// which puts every report into a [Pending] first, is the only caller.
type Source interface {
	Name() string

	// Complete says whether all that QEMU and the guest write to the block shows in this source. KVM's dirty log,
	// which misses devices, answers false: it is a witness, and cannot carry an increment by itself.
	Complete(block int) bool

	// Arm begins tracking of the blocks that are not under tracking, or goes on with it. It protects nothing: what it
	// begins with counts as written until it is harvested.
	Arm(ctx context.Context) error

	// Estimate counts the pages that a harvest would report now. It changes nothing.
	Estimate(ctx context.Context) (pages uint64, err error)

	// HarvestLive reports what was written and re-arms exactly that, the guest running. A source that cannot do both
	// in one atomic step reports nothing. After an error pages may have been re-armed and lost.
	HarvestLive(ctx context.Context) (Sets, error)

	// HarvestStanding reports what was written, and changes nothing.
	HarvestStanding(ctx context.Context, still Standstill) (*Standing, error)
}

// Standing is what a source found while the VM stood still.
type Standing struct {
	Written Sets // nil sets for blocks that the source does not look at

	// Holes are the unpopulated pages, for the blocks where the source knows them; they read as zeros. No page is in
	// both.
	Holes Sets

	// Guarded are the pages that a guard protects: nobody has written them since it does. They are in Written too. Nil sets as there.
	Guarded Sets

	// rearm starts tracking over from the standstill, and reports all that it re-armed. It has to be called in the same
	// standstill or not at all: not calling it is safe, the pages are reported once more.
	rearm func(ctx context.Context) (rearmed Sets, err error)
}
