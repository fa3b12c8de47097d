package restore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// watch makes sure that the machine stands still while it is restored. It is a [dirty.Standstill].
type watch struct {
	monitor qemu.Monitor
	events  *qemu.Subscription
	cancel  context.CancelCauseFunc // ends the restore

	mu       sync.Mutex
	broken   error
	marked   atomic.Bool // the machine's memory is not its own any more: it must not run
	finished sync.WaitGroup
}

// startWatch begins before the machine is looked at: what happened before shows in its run state, what happens from here on as an event.
func startWatch(m qemu.Monitor, cancel context.CancelCauseFunc) *watch {
	w := &watch{monitor: m, events: m.Subscribe("RESUME"), cancel: cancel}
	w.finished.Go(func() {
		for e := range w.events.C {
			w.fail(fmt.Errorf("%w at %s", ErrResumed, e.Time.Format("15:04:05.000000")))
			w.stopAgain() //nolint:errcheck // the restore ends by this, and tries again then
		}
		if err := w.events.Err(); err != nil {
			w.fail(fmt.Errorf("watch whether the machine stands still: %w", err))
		}
	})
	return w
}

// Err is nil as long as nobody has resumed the machine.
func (w *watch) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken
}

func (w *watch) fail(err error) {
	w.mu.Lock()
	if w.broken == nil {
		w.broken = err
	}
	err = w.broken
	w.mu.Unlock()
	w.cancel(err)
}

// stopBound is how long stopping a machine may take. It flushes disks.
const stopBound = 30 * time.Second

// stopAgain stops a machine that runs with memory that is not whole. It does nothing as long as the memory is untouched: the machine is then
// not ours to stop.
func (w *watch) stopAgain() error {
	if !w.marked.Load() {
		return nil
	}
	// However the restore ends, this has to be done.
	ctx, cancel := context.WithTimeout(context.Background(), stopBound)
	defer cancel()
	state, err := qemu.Status(ctx, w.monitor)
	if err != nil || state != qemu.StateRunning {
		return err
	}
	if err := w.monitor.Execute(ctx, "stop", nil, nil); err != nil {
		return fmt.Errorf("stop the machine again: %w", err)
	}
	return nil
}

// end ends the watch and returns what it saw to the last.
func (w *watch) end() error {
	w.events.Close()
	w.finished.Wait()
	return w.Err()
}
