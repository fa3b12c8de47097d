package jobs

import (
	"context"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// ReleaseRequest asks for tracking to be taken out of a machine's process. No monitor is needed.
type ReleaseRequest struct {
	VM        VM     `json:"vm"`
	RecordDir string `json:"recordDir,omitempty"`
}

// ReleaseResult names the process that is as it was before its first capture.
type ReleaseResult struct {
	PID   int    `json:"pid"`
	Guest string `json:"guest,omitempty"`

	// Tracked says that there was any tracking to take out.
	Tracked bool `json:"tracked"`

	// MemoryInvalid says, where a restore has left the machine's memory half written, how. The mark of that stays.
	MemoryInvalid string `json:"memoryInvalid,omitempty"`
}

// Release takes tracking out of a process, in a worker.
func Release(ctx context.Context, r ReleaseRequest, h Handlers[struct{}]) (*ReleaseResult, error) {
	return do[ReleaseResult](ctx, nameRelease, r, h)
}

func runRelease(ctx context.Context, r ReleaseRequest, _ func(any)) (*ReleaseResult, error) {
	process, err := r.VM.Find(ctx)
	if err != nil {
		return nil, err
	}
	tracked, err := dirty.Release(ctx, sessionOf(process), recordDir(r.RecordDir))
	if err != nil {
		return nil, err
	}
	result := &ReleaseResult{PID: process.PID, Guest: process.Guest, Tracked: tracked}
	if err := restore.Invalid(recordDir(r.RecordDir), sessionOf(process)); err != nil {
		result.MemoryInvalid = err.Error()
	}
	return result, nil
}
