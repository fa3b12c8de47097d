package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// watch makes sure that the machine stands still, and stays where it is, while it is restored. It is a [dirty.Standstill].
type watch struct {
	monitor qemu.Monitor
	events  *qemu.Subscription
	cancel  context.CancelCauseFunc // ends the restore

	mu       sync.Mutex
	broken   error
	marked   atomic.Bool // the machine's memory is not its own any more: it must not run, here or elsewhere
	stop     context.CancelFunc
	finished sync.WaitGroup
}

// migrationEvery is how often it is asked whether the machine is being migrated. QEMU tells of it by events only where somebody has switched
// them on (libvirt does); to carry off the memory of even a small machine takes longer.
const migrationEvery = 20 * time.Millisecond

// startWatch begins before the machine is looked at: what happened before shows in its run state, what happens from here on as an event.
func startWatch(ctx context.Context, m qemu.Monitor, cancel context.CancelCauseFunc) *watch {
	w := &watch{monitor: m, events: m.Subscribe("RESUME", "MIGRATION"), cancel: cancel}
	ctx, w.stop = context.WithCancel(ctx)
	w.finished.Go(func() {
		for e := range w.events.C {
			w.saw(e)
		}
		if err := w.events.Err(); err != nil {
			w.fail(fmt.Errorf("watch whether the machine stands still: %w", err))
		}
	})
	w.finished.Go(func() { w.pollMigration(ctx) })
	return w
}

// saw does what an event asks for.
func (w *watch) saw(e qemu.Event) {
	if e.Name == "RESUME" {
		w.fail(fmt.Errorf("%w at %s", ErrResumed, e.Time.Format("15:04:05.000000")))
		w.stopAgain() //nolint:errcheck // the restore ends by this, and tries again then
		return
	}
	var data struct {
		Status qemu.MigrationStatus `json:"status"`
	}
	if json.Unmarshal(e.Data, &data) == nil {
		w.migrates(data.Status)
	}
}

// pollMigration asks again and again, until ctx ends or a migration is seen.
func (w *watch) pollMigration(ctx context.Context) {
	tick := time.NewTicker(migrationEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A monitor that does not answer shows elsewhere.
		if m, err := qemu.Migration(ctx, w.monitor); err == nil && w.migrates(m.Status) {
			return
		}
	}
}

// migrates ends the restore where a migration is under way, and ends that as well where it would carry off memory that is not whole: there is
// no mark where it goes to.
func (w *watch) migrates(status qemu.MigrationStatus) bool {
	if status.Idle() || status == qemu.MigrationCancelling {
		return false
	}
	err := fmt.Errorf("%w: its status is %q", ErrMigrating, string(status))
	if w.marked.Load() {
		if status == qemu.MigrationCompleted {
			err = fmt.Errorf("%w; what has arrived there is not whole, and must not run either", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), stopBound)
		defer cancel()
		if cancelErr := w.monitor.Execute(ctx, "migrate_cancel", nil, nil); cancelErr != nil {
			err = errors.Join(err, fmt.Errorf("cancel the migration: %w", cancelErr))
		}
	}
	w.fail(err)
	return true
}

// Err is nil as long as nobody has resumed the machine, or taken it elsewhere.
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
	w.stop()
	w.events.Close()
	w.finished.Wait()
	return w.Err()
}
