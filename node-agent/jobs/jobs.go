package jobs

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

// The names of the jobs.
const (
	nameCapture  = "capture"
	nameRestore  = "restore"
	nameContinue = "continue"
	nameRelease  = "release"
	nameImage    = "image"
	nameDelete   = "delete"
)

// dialTimeout bounds how long a monitor may take to answer.
const dialTimeout = 10 * time.Second

// All returns the jobs, for [supervise.Main].
func All() map[string]supervise.Job {
	return map[string]supervise.Job{
		nameCapture:  job(runCapture),
		nameRestore:  job(runRestore),
		nameContinue: job(runContinue),
		nameRelease:  job(runRelease),
		nameImage:    job(runImage),
		nameDelete:   job(runDelete),
	}
}

// job decodes the request of a job.
func job[Request, Result any](run func(context.Context, Request, func(any)) (Result, error)) supervise.Job {
	return func(ctx context.Context, raw json.RawMessage, progress func(any)) (any, error) {
		var r Request
		if err := json.Unmarshal(raw, &r); err != nil {
			return nil, fmt.Errorf("decode the request: %w", err)
		}
		return run(ctx, r, progress)
	}
}

// Handlers are called while a worker runs. Each may be nil.
type Handlers[Progress any] struct {
	Started  func(pid int)  // the worker's, before anybody waits for it
	Progress func(Progress) // by one goroutine
}

// do has a job done in a worker.
func do[Result, Progress any](ctx context.Context, name string, request any, h Handlers[Progress]) (*Result, error) {
	return doCommitted[Result](ctx, name, request, h, nil)
}

// doCommitted is do for a job whose worker is not to be killed at some time: see [supervise.Options].
func doCommitted[Result, Progress any](ctx context.Context, name string, request any, h Handlers[Progress], committed func() bool) (*Result, error) {
	// Held here as well, so that the connection does not end with a worker that is killed: see [qemu.Settle].
	socket, err := qemu.NewSocket()
	if err != nil {
		return nil, err
	}
	defer qemu.Settle(socket)
	options := supervise.Options{Started: h.Started, Files: []*os.File{socket}, Committed: committed}
	if h.Progress != nil {
		options.Progress = func(raw json.RawMessage) {
			var p Progress
			if json.Unmarshal(raw, &p) == nil {
				h.Progress(p)
			}
		}
	}
	result := new(Result)
	if err := supervise.Run(ctx, name, request, result, options); err != nil {
		return nil, err
	}
	return result, nil
}
