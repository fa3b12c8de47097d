package agent_test

import (
	"context"
	"slices"
	"sync"

	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// gate is the engine itself, held up where the test says, and counted.
type gate struct {
	agent.Workers
	before, after chan struct{} // where they are set, a capture waits there until it is told to go on, or to end
	reached       chan string   // told of each wait; nil for none

	mu       sync.Mutex
	captures []string
	restored int
	fail     []error // what the next restores end with, in place of their work

	// at is told where a restore stands, by the one goroutine that reads it from the worker.
	at func(worker int, p restore.Progress)

	restoredAfter chan struct{} // closed when a restore is done, and onRestored was called
	onRestored    func()
}

func (g *gate) hold(ctx context.Context, where string, c chan struct{}) error {
	if c == nil {
		return nil
	}
	g.reached <- where
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *gate) Capture(ctx context.Context, r jobs.CaptureRequest, progress func(capture.Progress)) (*capture.Result, error) {
	if err := g.hold(ctx, "before", g.before); err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.captures = append(g.captures, r.Name)
	g.mu.Unlock()
	result, err := g.Workers.Capture(ctx, r, progress)
	if err != nil {
		return nil, err
	}
	return result, g.hold(ctx, "after", g.after)
}

func (g *gate) Restore(ctx context.Context, r jobs.RestoreRequest, progress func(restore.Progress)) (*restore.Result, error) {
	g.mu.Lock()
	g.restored++
	var fail error
	if len(g.fail) != 0 {
		fail, g.fail = g.fail[0], g.fail[1:]
	}
	g.mu.Unlock()
	if fail != nil {
		return nil, fail
	}
	worker := 0
	result, err := jobs.Restore(ctx, r, jobs.Handlers[restore.Progress]{
		Started: func(pid int) { worker = pid },
		Progress: func(p restore.Progress) {
			progress(p)
			if g.at != nil {
				g.at(worker, p)
			}
		},
	})
	if g.onRestored != nil {
		g.onRestored()
		close(g.restoredAfter)
	}
	return result, err
}

// captured lists the captures that were begun.
func (g *gate) captured() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.captures)
}
