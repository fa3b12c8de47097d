package main

import (
	"context"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// interruptible returns a context that the first signal ends. A worker is asked to end by that, lets its machine go and
// removes what it began to write; a second signal kills it. The machine runs on then as well (package guard), and what it wrote
// is swept later. A restore that is overwriting memory is brought to its end by the first; the second leaves that memory invalid.
func (p *program) interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	done := ctx.Done()
	go func() {
		first := true
		for {
			select {
			case <-p.signals:
				switch {
				case !first:
					p.workers.kill()
				case p.workers.running():
					if p.terminal {
						fmt.Fprintln(p.stderr) // beneath the bar
					}
					if p.workers.committed() {
						fmt.Fprintln(p.stderr, "the machine's memory is being overwritten: the restore comes to its end first; "+
							"to interrupt again kills it, and leaves the machine paused and its memory invalid")
					} else {
						fmt.Fprintln(p.stderr, "ending in order; interrupt again to kill the worker")
					}
				}
				first = false
				cancel()
			case <-done:
				if first {
					return // the command has ended
				}
				done = nil // goes on for the second signal; the process ends soon
			}
		}
	}()
	return ctx, cancel
}

// workers knows the worker that runs, if one does. There is one at a time.
type workers struct {
	mu    sync.Mutex
	pidfd *os.File
	late  func() bool // see commits
}

// commits says how it is found out that the worker to come has begun what it will bring to its end.
func (w *workers) commits(late func() bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.late = late
}

func (w *workers) committed() bool {
	w.mu.Lock()
	late := w.late
	w.mu.Unlock()
	return late != nil && late()
}

// started is called with a worker's pid before anybody waits for it, so that the pid is still its own.
func (w *workers) started(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it cannot be killed early then, and ends in its own time
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pidfd = os.NewFile(uintptr(fd), "worker")
}

func (w *workers) ended() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pidfd != nil {
		w.pidfd.Close()
		w.pidfd = nil
	}
}

func (w *workers) running() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pidfd != nil
}

func (w *workers) kill() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pidfd != nil {
		unix.PidfdSendSignal(int(w.pidfd.Fd()), unix.SIGKILL, nil, 0) //nolint:errcheck // it may be gone
	}
}
