package jobs

import (
	"context"
	"errors"

	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

// RestoreRequest asks for an image to be put into a machine. That the image is verified before the machine is touched cannot be
// asked away.
type RestoreRequest struct {
	VM         VM         `json:"vm"`
	Repository Repository `json:"repository"`

	Image       string `json:"image"`
	InPlace     bool   `json:"inPlace,omitempty"`
	Run         bool   `json:"run,omitempty"`
	FullCompare bool   `json:"fullCompare,omitempty"`
	RecordDir   string `json:"recordDir,omitempty"`
}

// Restore puts an image into a machine, in a worker. An error after which the machine's memory is invalid has [CodeLost], a worker
// that was killed in the middle included.
func Restore(ctx context.Context, r RestoreRequest, h Handlers[restore.Progress]) (*restore.Result, error) {
	// Found here, for the case that the worker cannot tell any more which process it was at work on.
	process, err := r.VM.Find(ctx)
	if err != nil {
		return nil, err
	}
	r.VM.PID = process.PID
	result, err := do[restore.Result](ctx, nameRestore, r, h)
	if died := as[*supervise.DiedError](err); died != nil {
		var invalid *restore.InvalidMemoryError
		if errors.As(restore.Invalid(recordDir(r.RecordDir), sessionOf(process)), &invalid) {
			invalid.Err = died
			return nil, invalid
		}
	}
	return result, err
}

func runRestore(ctx context.Context, r RestoreRequest, progress func(any)) (*restore.Result, error) {
	repository, err := r.Repository.Open()
	if err != nil {
		return nil, err
	}
	defer repository.Close()
	img, err := repository.Open(ctx, r.Image)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	process, monitor, err := r.VM.open(ctx)
	if err != nil {
		return nil, err
	}
	defer monitor.Close()
	return restore.Run(ctx, restore.Target{Process: process, Monitor: monitor}, img, restore.Options{
		InPlace:     r.InPlace,
		Run:         r.Run,
		FullCompare: r.FullCompare,
		RecordDir:   r.RecordDir,
		Progress:    func(p restore.Progress) { progress(p) },
	})
}
