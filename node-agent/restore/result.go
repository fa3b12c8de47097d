package restore

import (
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Result is what came of a restore. As JSON it is what the command line prints.
type Result struct {
	Image   string       `json:"image"`
	Digest  image.Digest `json:"digest"` // of the manifest
	PID     int          `json:"pid"`
	Stopped bool         `json:"stopped"` // the machine was running, and stopped for this
	Resumed bool         `json:"resumed"` // the machine was continued at the end

	Began    time.Time     `json:"began"`
	Duration time.Duration `json:"duration"` // ns
	Phases   []Phase       `json:"phases"`

	Memory MemoryReport `json:"memory"`

	// PutAgain are the pages that the reset and the load had changed.
	PutAgain []BlockPages `json:"putAgain,omitempty"`

	// ComparedPages were compared with the image after the load.
	ComparedPages uint64 `json:"comparedPages"`

	// Tolerated are the differences between the recorded machine and this one that do not keep the state from being loaded.
	Tolerated []qemu.Difference `json:"tolerated,omitempty"`

	// Tracking says why the next checkpoint cannot count from this image by tracking, and has to by content hash; empty where it can.
	Tracking string `json:"tracking,omitempty"`

	// Warnings are what went wrong without harm to the machine.
	Warnings []string `json:"warnings,omitempty"`
}

// Phase is a part of something with its share of the time.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"duration"` // ns
}

// MemoryReport says how memory was put in.
type MemoryReport struct {
	Bytes        uint64 `json:"bytes"`        // of all RAM blocks
	StoredBytes  uint64 `json:"storedBytes"`  // written from the image's frames
	UniformBytes uint64 `json:"uniformBytes"` // written, one repeated word
	ZeroedBytes  uint64 `json:"zeroedBytes"`  // zeros over something else
}

// BlockPages are pages of a RAM block.
type BlockPages struct {
	Block string        `json:"block"`
	Pages uint64        `json:"pages"`
	Runs  []pageset.Run `json:"runs"` // the first few
}

// runsShown is how many runs of pages a report names.
const runsShown = 8

// describePages sums a set up.
func describePages(block string, set *pageset.Set) BlockPages {
	b := BlockPages{Block: block, Pages: set.Count()}
	for run := range set.Runs() {
		if len(b.Runs) == runsShown {
			break
		}
		b.Runs = append(b.Runs, run)
	}
	return b
}

// Progress is where a restore stands.
type Progress struct {
	Phase      string `json:"phase"` // "verifying", "preparing", "memory", "loading", "comparing"
	DoneBytes  int64  `json:"doneBytes"`
	TotalBytes int64  `json:"totalBytes"` // 0 where the phase has no such number

	// MemoryInvalid says that the machine's memory is marked invalid: see [Mark].
	MemoryInvalid bool `json:"memoryInvalid,omitempty"`
}
