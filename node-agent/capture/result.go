package capture

import (
	"time"

	"github.com/vmckpt/vmckpt/image"
)

// Result is what came of a checkpoint. As JSON it is what the command line prints, and the image's report.
type Result struct {
	Image  string       `json:"image"`
	Digest image.Digest `json:"digest,omitzero"` // of the manifest
	Parent string       `json:"parent,omitempty"`

	// Source names the dirty source the pages were chosen by: "page tables", "content hash" (for one RAM block at the least), or "" for
	// a base.
	Source string `json:"source,omitempty"`

	// Why says in words why the image is a base, or why the content hash was used, where that was not asked for.
	Why string `json:"why,omitempty"`

	Began    time.Time     `json:"began"`
	Instant  time.Time     `json:"instant"`  // when the machine stood still
	Duration time.Duration `json:"duration"` // ns

	// OwnerPaused says that the machine was paused by its owner, before and after the checkpoint.
	OwnerPaused bool `json:"ownerPaused,omitempty"`

	// Pauses are all times that the machine was held for this checkpoint, lost attempts included. Downtime is their sum, as far as the guest
	// would have run: those of a machine that its owner had paused are not in it.
	Pauses   []Pause       `json:"pauses"`
	Downtime time.Duration `json:"downtime"` // ns
	Phases   []Phase       `json:"phases"`
	Attempts int           `json:"attempts"` // at the instant; 1 where the first one held

	// Lost says why each attempt before the last came to nothing, and what else did not come off.
	Lost []string `json:"lost,omitempty"`

	Harvest HarvestReport    `json:"harvest"`
	Guard   *GuardReport     `json:"guard,omitempty"` // of the last attempt that had one
	Witness *WitnessReport   `json:"witness,omitempty"`
	Pages   image.PageCounts `json:"pages,omitzero"`
}

// held is how long the machine was held in all.
func (r *Result) held() (held time.Duration) {
	for _, p := range r.Pauses {
		held += p.Total
	}
	return held
}

// Pause is one time that the machine stood still.
type Pause struct {
	For   string        `json:"for"`   // "instant", "barrier"
	Total time.Duration `json:"total"` // ns; from QEMU's STOP to its RESUME where it told both, else as seen from here
	Exact bool          `json:"exact"` // Total is from QEMU's own stamps
	Lost  bool          `json:"lost,omitempty"`
	Parts []Phase       `json:"parts"`
}

// balance makes the parts add up to the pause: the last one, which ends with QEMU's answer, may go beyond the moment at which the machine
// ran again; and what passed unseen between two parts gets a name.
func (p *Pause) balance() {
	left := p.Total
	for i := range p.Parts {
		p.Parts[i].Duration = min(p.Parts[i].Duration, left)
		left -= p.Parts[i].Duration
	}
	if left > 0 {
		p.Parts = append(p.Parts, Phase{"other", left})
	}
}

// Phase is a part of something with its share of the time.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"duration"` // ns
}

// HarvestReport is how many pages came by which way.
type HarvestReport struct {
	Estimated uint64 `json:"estimated"` // known to be dirty at the beginning
	Live      uint64 `json:"live"`      // copied with the guest running
	Residue   uint64 `json:"residue"`   // copied in the hold
	Rounds    int    `json:"rounds"`    // of copying with the guest running
}

// GuardReport is what was copied after the instant, the guest running: see [guard.Guard].
type GuardReport struct {
	Areas   int    `json:"areas"`   // of memory
	Pages   uint64 `json:"pages"`   // in them
	Guarded uint64 `json:"guarded"` // of those, copied after the instant: the others were written before it, or hold nothing
	Caught  uint64 `json:"caught"`  // of those, copied because the guest was about to write them
	Faults  uint64 `json:"faults"`  // writes of the guest's that waited, before the instant and after it
}

// WitnessReport is what KVM's dirty log had to say, where it was asked for.
type WitnessReport struct {
	// Compared says that it and the page tables both saw the whole time since the last checkpoint. Why says why not, else.
	Compared bool   `json:"compared"`
	Why      string `json:"why,omitempty"`

	Missed uint64 `json:"missed"`           // pages only in the KVM log: there must be none
	First  string `json:"first,omitempty"`  // one of them
	Nested bool   `json:"nested,omitempty"` // the guest runs guests of its own: such pages are expected, and were taken
	// Unseen are pages only in the page tables, where the log looks: what only devices wrote, and what the page tables take for written as
	// they cannot tell (areas that were guarded, huge pages).
	Unseen uint64 `json:"unseen"`

	// What it cost while the machine stood still, in ns: finding the memory slots, once; reading; clearing.
	Find  time.Duration `json:"find,omitempty"`
	Read  time.Duration `json:"read"`
	Clear time.Duration `json:"clear"`
}

// Alarm says that the page tables missed a write. The image is right all the same.
func (w *WitnessReport) Alarm() bool { return w != nil && w.Missed > 0 && !w.Nested }

// Progress is where a checkpoint stands.
type Progress struct {
	Phase      string         `json:"phase"` // "preparing", "copying", "instant", "writing", "sealing"
	DonePages  uint64         `json:"donePages"`
	TotalPages uint64         `json:"totalPages"` // to be looked at in this phase; 0 where it has no such number
	Image      image.Progress `json:"image"`
}
