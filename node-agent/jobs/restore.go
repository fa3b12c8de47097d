package jobs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
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
// that was killed in the middle included. A machine that such a worker had stopped and not written to is continued.
//
// When ctx ends the restore does too, unless the machine's memory is being overwritten: that it brings to its end, and it succeeds. Whoever
// cannot wait for that kills the worker, whose pid [Handlers].Started has.
func Restore(ctx context.Context, r RestoreRequest, h Handlers[restore.Progress]) (*restore.Result, error) {
	// Found here, for the case that the worker cannot tell any more which process it was at work on.
	process, err := r.VM.Find(ctx)
	if err != nil {
		return nil, err
	}
	r.VM.PID = process.PID
	began := time.Now()
	result, err := doCommitted[restore.Result](ctx, nameRestore, r, h, func() bool { return r.Overwriting(process, began) })
	if died := as[*supervise.DiedError](err); died != nil {
		return nil, afterDeath(ctx, r, process, died)
	}
	return result, err
}

// Overwriting tells whether a restore of the request that began at some time, or later, is overwriting the memory of a process now.
func (r RestoreRequest) Overwriting(process *qemu.Process, began time.Time) bool {
	var invalid *restore.InvalidMemoryError
	return errors.As(restore.Invalid(recordDir(r.RecordDir), sessionOf(process)), &invalid) && !invalid.Mark.Since.Before(began)
}

// continueBound is how long it may take to let a machine go on whose restore was killed: a disk that is being flushed by its `stop` is waited for.
const continueBound = 30 * time.Second

// afterDeath says what a restore that was killed has left behind, and puts right what can be.
func afterDeath(ctx context.Context, r RestoreRequest, process *qemu.Process, died *supervise.DiedError) error {
	dir := recordDir(r.RecordDir)
	var invalid *restore.InvalidMemoryError
	if errors.As(restore.Invalid(dir, sessionOf(process)), &invalid) {
		invalid.Err = died
		return invalid
	}
	stop, err := restore.LeftStopped(dir, sessionOf(process))
	if err != nil {
		return errors.Join(died, err)
	}
	if stop == nil || !process.Alive() {
		return died
	}
	// Whatever it was that killed the worker, an interrupt included: this is to be done. It is a worker of its own, since nothing that
	// waits for a machine is done in this process.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), continueBound)
	defer cancel()
	if err := supervise.Run(ctx, nameContinue, r, nil, supervise.Options{}); err != nil {
		return &restore.StoppedError{Err: died, Why: err}
	}
	return fmt.Errorf("%w; the machine, stopped for the restore and not written to, was continued", died)
}

func runContinue(ctx context.Context, r RestoreRequest, _ func(any)) (any, error) {
	process, monitor, err := r.VM.open(ctx, recordDir(r.RecordDir))
	if err != nil {
		return nil, err
	}
	defer monitor.Close()
	return nil, restore.Continue(ctx, restore.Target{Process: process, Monitor: monitor}, recordDir(r.RecordDir))
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
	process, monitor, err := r.VM.open(ctx, recordDir(r.RecordDir))
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
