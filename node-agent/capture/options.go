package capture

import (
	"context"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Target is the machine that a checkpoint is taken of.
type Target struct {
	Process *qemu.Process
	Monitor qemu.Monitor
}

// Mode says what an image is to hold.
type Mode string

const (
	Auto        Mode = "auto"        // an increment where there is something to build on, else a base
	Full        Mode = "full"        // a base: every page, whatever earlier images hold
	Incremental Mode = "incremental" // an increment, or an error
)

// When says which moment an image describes.
type When string

const (
	// Late copies what is dirty first, with the guest running, and takes the instant when little is left: the image is as new as can be.
	Late When = "late"
	// Early takes the instant at once, and copies afterwards what is dirty, on a guard: the image is of the moment it was asked for.
	Early When = "early"
)

// Options say how a checkpoint is taken. Name must be set; everything else has a default.
type Options struct {
	Name        string            // of the image
	Mode        Mode              // default Auto
	Instant     When              // default Late
	Compression image.Compression // its zero value stores pages as they are

	// Parent names the image that an increment is made on. Default: the image that tracking counts from, else the newest
	// image of the same machine in the repository.
	Parent string

	// VerifyParent has every byte of the parent checked before an increment is made on it; one that is damaged means a base. It reads
	// the whole chain's data. Without it damage is found in the parent's manifest and index, in the sizes of its files, and in the hashes
	// that pages are compared with; damage within its pages is found by verifying or restoring.
	VerifyParent bool

	// OtherKeys says that the repository's keys have been changed: images under others are passed over, and where no other is left to build
	// on the image is a base. Without it they mean that the keys are the wrong ones, which is an error.
	OtherKeys bool

	// Witness has KVM's dirty log kept as a second opinion on what the guest wrote. A page that the page tables missed makes the image by
	// content hash, copied in the pause. It is switched on in the pause of the first checkpoint with it, and off in that of the next without.
	Witness bool

	// RecordDir is where the node keeps session records; default [dirty.DefaultRecordDir]. It must not outlive the boot.
	RecordDir string

	// ResidueBudget is how long copying in the hold may take; default 5 ms, which is worth a page a microsecond. Where more is
	// dirty, it is copied beforehand, with the guest running.
	ResidueBudget time.Duration

	// HoldBound is how long the machine is held at the most; default 200 ms. Past it the leash is let go and the attempt lost.
	HoldBound time.Duration

	// PauseBound is how long it may be held where the guest writes faster than its memory can be copied, so that the
	// residue stays beyond its budget; default 5 s. It is for guests that cannot be captured otherwise.
	PauseBound time.Duration

	// WriteBound is how long a write of the guest's may wait for memory that is guarded, see [Early]; default 50 ms. Past it the guard is given
	// up, and the attempt lost.
	WriteBound time.Duration

	// Attempts is how often the instant is tried, since devices may come and go and the holder may be killed; default 5.
	Attempts int

	// Attributes are kept with the image, as they are. [AttributeGuest] and [AttributeUUID] are not among them.
	Attributes map[string]string

	// Admit is asked once the machine's session is this checkpoint's own, so that nobody else is at work on the machine; its error ends
	// the checkpoint.
	Admit func() error `json:"-"`

	// Progress is called with where the checkpoint stands, by one goroutine at a time, ten times a second at the most.
	Progress func(Progress) `json:"-"`

	// Hooks are for tests.
	Hooks Hooks `json:"-"`
}

// Hooks let a test look and interfere. Each may be nil.
type Hooks struct {
	// Held is called while the machine is held, after the residue was copied and before it is let go.
	Held func(ctx context.Context, layout qemu.Layout) error

	// Step is called at each named step of a checkpoint, see [Steps].
	Step func(step Step)

	// Nested has the guest pass for one that runs guests of its own.
	Nested bool

	// Omit tells of pages that are left out on purpose, so that a test of the truth can be seen to fail.
	Omit func(block int, page uint64) bool
}

// Step names a point in the course of a checkpoint.
type Step string

// The steps, in order. Those from Harvested to Copied come once a round; Lent, Guarded, Kept, and from Confirmed to Unguarded, only where something is guarded.
const (
	StepBegun       Step = "begun"        // nothing was touched yet
	StepInvalidated Step = "invalidated"  // the session record is invalid, and synced so
	StepHarvested   Step = "harvested"    // a live harvest has re-armed
	StepBarrier     Step = "barrier"      // the machine stood still for the drained pause, and runs again
	StepCopied      Step = "copied"       // what was harvested live is copied
	StepLent        Step = "lent"         // what is to be guarded is out of tracking
	StepGuarded     Step = "guarded"      // the guest's writes there wait for the guard
	StepArmed       Step = "armed"        // the leash is ready, the command not sent
	StepSent        Step = "command sent" // QEMU stops the machine at any moment
	StepHeld        Step = "held"
	StepScanned     Step = "scanned"
	StepKept        Step = "kept" // from now on the guard copies a page before it lets it go
	StepResidue     Step = "residue copied"
	StepRearmed     Step = "rearmed"   // tracking counts from the instant on
	StepReleased    Step = "released"  // the machine runs again
	StepConfirmed   Step = "confirmed" // the instant counts; nothing of what is guarded is copied yet
	StepTaken       Step = "taken"     // what was guarded is copied, the guard still there
	StepUnguarded   Step = "unguarded"
	StepSealing     Step = "sealing"
	StepSealed      Step = "sealed" // the image is there, the record still invalid
	StepRecorded    Step = "recorded"
)

// Steps are all steps in order.
var Steps = []Step{
	StepBegun, StepInvalidated, StepHarvested, StepBarrier, StepCopied, StepLent, StepGuarded, StepArmed, StepSent, StepHeld, StepScanned,
	StepKept, StepResidue, StepRearmed, StepReleased, StepConfirmed, StepTaken, StepUnguarded, StepSealing, StepSealed, StepRecorded,
}

func (o Options) withDefaults() Options {
	if o.Mode == "" {
		o.Mode = Auto
	}
	if o.Instant == "" {
		o.Instant = Late
	}
	if o.RecordDir == "" {
		o.RecordDir = dirty.DefaultRecordDir
	}
	if o.ResidueBudget == 0 {
		o.ResidueBudget = 5 * time.Millisecond
	}
	if o.HoldBound == 0 {
		o.HoldBound = 200 * time.Millisecond
	}
	if o.PauseBound == 0 {
		o.PauseBound = 5 * time.Second
	}
	if o.WriteBound == 0 {
		o.WriteBound = guard.DefaultWriteBound
	}
	if o.Attempts == 0 {
		o.Attempts = 5
	}
	return o
}

// copyTime is what copying a page in the hold is reckoned at. Measured: 0.2 µs in runs of a megabyte, 0.8 µs scattered.
const copyTime = time.Microsecond

// budgetPages is how many pages fit the residue's budget.
func (o Options) budgetPages() uint64 { return uint64(o.ResidueBudget / copyTime) }

// step tells the test's hook where the checkpoint stands.
func (o Options) step(s Step) {
	if o.Hooks.Step != nil {
		o.Hooks.Step(s)
	}
}
