package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// restore is one restore under way.
type restore struct {
	target   Target
	image    *image.Image
	manifest image.Manifest
	o        Options
	result   Result
	report   *reporter

	state       []byte // the device state as saved
	machineType string // the target's
	layout      qemu.Layout
	blocks      []block // by the image's order
	dirtyBlocks []dirty.Block

	parent    context.Context // the caller's
	detach    func() bool     // takes the work from it, unless it has ended
	committed bool            // it was taken

	session *dirty.Session
	watch   *watch
	stopped bool  // by us, out of running
	invalid bool  // an earlier restore had left the memory invalid
	touched bool  // something may have been written to the machine's memory
	mark    *Mark // as it is on the disk; nil where memory is valid
	memory  *memory
	nonzero dirty.Sets // pages that hold something other than zeros
}

// Run restores an image into the target. The errors to act on are [*image.DamageError] and [*MismatchError], [*StateError] ([ErrNotPaused]),
// [dirty.ErrBusy], [dirty.ErrGone], [ErrResumed] and [ErrMigrating]. Whatever the error, the machine is as it was before, but for three:
//
//   - [*InvalidMemoryError]: it stands still with its memory half written, is marked so ([Invalid]), and waits for the next restore. Or it
//     was found so, and running ([ErrNotPaused]): somebody else has resumed it, and it is for the caller to stop it or to allow that.
//   - [*RestoredError]: it is restored, all of it, and was to run and does not.
//   - [*StoppedError]: it stands still, was not written to, and ran before.
//
// When ctx ends before the machine is marked, so does the restore. After that it goes on to its end, the guest's running included, and
// succeeds: only the end of this process is faster.
func Run(ctx context.Context, target Target, img *image.Image, o Options) (_ *Result, err error) {
	r := &restore{target: target, image: img, manifest: img.Manifest(), o: o.withDefaults()}
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore image %s into %v: %w", r.manifest.Name, target.Process, err)
		}
	}()
	r.result = Result{Image: r.manifest.Name, Digest: img.Digest(), PID: target.Process.PID, Began: time.Now()}
	r.result.Memory.Bytes = r.manifest.MemoryBytes()
	r.report = newReporter(r.o.Progress)
	defer r.report.stop()
	if err := r.readImage(ctx); err != nil {
		return nil, err
	}
	if err := r.withMachine(ctx); err != nil {
		return nil, err
	}
	r.result.Duration = time.Since(r.result.Began)
	return &r.result, nil
}

// readImage makes sure that the image is sound, before anybody looks at the machine.
func (r *restore) readImage(ctx context.Context) (err error) {
	defer r.phase("read")()
	if !r.o.SkipVerify {
		r.report.phase("verifying", 0)
		if err := r.image.VerifyFiles(ctx, r.report.reach); err != nil {
			return err
		}
	}
	if r.state, err = r.image.DeviceState(ctx); err != nil {
		return err
	}
	if _, err := devstate.Parse(r.state); err != nil {
		return fmt.Errorf("device state of image %s: %w", r.manifest.Name, err)
	}
	return r.o.step(StepVerified)
}

// withMachine does all that has to do with the machine.
func (r *restore) withMachine(parent context.Context) (err error) {
	r.report.phase("preparing", 0)
	// Ends with the caller's context only until the mark is set, see [restore.commit]; with what the watch sees, always.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(parent))
	defer cancel(nil)
	r.parent = parent
	r.detach = context.AfterFunc(parent, func() { cancel(context.Cause(parent)) })
	defer r.detach()
	done := r.phase("examine")
	if err := r.examine(ctx); err != nil {
		return err
	}
	if err := r.o.step(StepExamined); err != nil {
		return err
	}
	p := r.target.session()
	if r.session, err = dirty.Open(ctx, p, r.dirtyBlocks, r.o.RecordDir, dirty.Options{}); err != nil {
		return err
	}
	defer r.session.Close() //nolint:errcheck // the record was written where it counts
	if err := Invalid(r.o.RecordDir, p); err != nil {
		r.invalid = true // and is about to be made valid, however unreadable the mark is
		r.report.marked(true)
	}
	done()
	if err := r.o.step(StepLocked); err != nil {
		return err
	}
	dir, err := os.OpenRoot(r.o.RecordDir)
	if err != nil {
		return fmt.Errorf("record directory: %w", err)
	}
	defer dir.Close()

	r.watch = startWatch(ctx, r.target.Monitor, cancel)
	r.watch.marked.Store(r.invalid)
	err = r.replace(ctx, dir)
	seen := r.watch.end()
	if err == nil {
		err = seen
	} else if seen != nil {
		err = seen // whatever failed after it failed for that
	} else if parent.Err() != nil && !r.committed {
		err = endedBy(context.Cause(parent), err)
	}
	if err != nil {
		return r.leave(dir, err)
	}
	if err := r.unmark(dir); err != nil {
		return r.leave(dir, err)
	}
	// Nothing that happens from here on takes anything from the machine but that it runs.
	err = r.o.step(StepUnmarked)
	if err == nil && r.o.Run {
		err = r.run(ctx)
	}
	if err != nil && !r.target.Process.Alive() {
		return fmt.Errorf("%w: %w", dirty.ErrGone, err)
	}
	if err != nil {
		return &RestoredError{err}
	}
	return nil
}

// replace replaces the machine's memory and device state. The machine stands still when it returns nil, and all is as the image says.
func (r *restore) replace(ctx context.Context, dir *os.Root) error {
	if err := r.standStill(ctx, dir); err != nil {
		return err
	}
	process, err := pagetable.OpenMemory(r.target.Process.PID)
	if err != nil {
		return err
	}
	defer process.Close()
	if !r.target.Process.Alive() {
		return fmt.Errorf("%w", dirty.ErrGone)
	}
	r.memory = newMemory(r.blocks, process, r.o.Hooks.Write)
	vehicle, err := openVehicle(ctx, r.target.Process)
	if err != nil {
		return err
	}
	defer func() {
		if err := vehicle.close(); err != nil {
			r.result.Warnings = append(r.result.Warnings, fmt.Sprintf("a file with the device state stays open in QEMU: %v", err))
		}
	}()
	if err := r.markInvalid(dir); err != nil {
		return err
	}
	if err := r.reset(ctx, vehicle); err != nil {
		return err
	}
	if err := r.fillMemory(ctx); err != nil {
		return err
	}
	if err := r.mark.enter(dir, "load"); err != nil {
		return err
	}
	if err := r.arm(ctx); err != nil {
		return err
	}
	if err := r.load(ctx, vehicle); err != nil {
		return err
	}
	if err := r.mark.enter(dir, "compare"); err != nil {
		return err
	}
	return r.finishMemory(ctx)
}

// standStill stops the machine, where it runs and may be stopped, and makes sure that it stays so.
func (r *restore) standStill(ctx context.Context, dir *os.Root) error {
	defer r.phase("stop")()
	// Once more, now that nobody else works on the machine and nobody resumes it unseen.
	running, err := r.checkState(ctx, r.o.InPlace)
	if err != nil {
		return err
	}
	if running {
		if err := r.noteStop(dir); err != nil {
			return err
		}
		if err := r.target.Monitor.Execute(ctx, "stop", nil, nil); err != nil {
			// It may be on its way all the same.
			r.stopped = true
			return fmt.Errorf("stop the machine: %w", err)
		}
		r.stopped, r.result.Stopped = true, true
		select {
		case <-time.After(r.o.Settle):
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := r.stillStands(ctx); err != nil {
			return err
		}
	}
	now, err := qemu.ReadLayout(ctx, r.target.Monitor, r.target.Process)
	if err != nil {
		return err
	}
	if !now.Equal(r.layout) {
		return errors.New("the machine's RAM blocks changed while it was looked at")
	}
	return r.o.step(StepStopped)
}

// noteStop notes that we are about to stop the machine, so that it does not stand for ever if we are killed.
func (r *restore) noteStop(dir *os.Root) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	stop := &Stop{Version: stopVersion, Process: r.target.session(), BootID: boot, Since: time.Now().UTC()}
	if err := stop.write(dir); err != nil {
		return errors.Join(err, removeStop(dir, stop.Process)) // it may be there all the same
	}
	return nil
}

// stillStands asks whether the machine stands: an event may be late.
func (r *restore) stillStands(ctx context.Context) error {
	_, err := r.checkState(ctx, false)
	if errors.Is(err, ErrNotPaused) {
		return ErrResumed
	}
	return err
}

// markInvalid notes that the machine's memory is not its own any more, and that tracking counts from nothing.
func (r *restore) markInvalid(dir *os.Root) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if err := r.session.Invalidate(context.Background()); err != nil {
		return err
	}
	mark := &Mark{
		Version: markVersion, BootID: boot, Since: time.Now().UTC(), Phase: "memory",
		Process: r.target.session(),
		Image:   dirty.Image{Name: r.manifest.Name, Digest: r.image.Digest().String()},
	}
	// From here on whoever resumes the machine has it stopped again. Had somebody resumed it before, it runs with its own memory.
	r.watch.marked.Store(true)
	err = r.watch.Err()
	if err == nil {
		err = r.commit()
	}
	if err == nil {
		err = mark.write(dir)
	}
	if err != nil {
		r.watch.marked.Store(r.invalid)
		if !r.invalid {
			err = errors.Join(err, mark.remove(dir)) // it may be there all the same
		}
		return err
	}
	r.mark, r.touched = mark, true
	r.report.marked(true)
	// The mark says more; and once that is gone, how the machine stands is what was asked for.
	if err := removeStop(dir, mark.Process); err != nil {
		return err
	}
	return r.o.step(StepMarked)
}

// commit makes the work go on to its end though the caller may not want it any more: half a memory is worse than one second more. It fails
// where the caller does not want it already.
func (r *restore) commit() error {
	if !r.detach() {
		return context.Cause(r.parent)
	}
	r.committed = true
	return nil
}

// endedBy says that work ended since its caller wanted it no more. How that showed may be far from it: a helper was killed.
func endedBy(cause, err error) error {
	if errors.Is(err, cause) || errors.Is(err, context.Canceled) {
		return cause
	}
	return fmt.Errorf("%w (%v)", cause, err)
}

// A reset that QEMU refuses is tried again so often, after so long.
const (
	resetTries = 5
	resetWait  = 200 * time.Millisecond
)

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reset makes the machine forget what its devices were told.
func (r *restore) reset(ctx context.Context, v *vehicle) error {
	defer r.phase("reset")()
	state, err := noDevices(r.machineType)
	if err != nil {
		return err
	}
	// What is loaded is our own and nothing. QEMU refuses it for a moment after a migration was cancelled, while it still tidies up.
	for try := 1; ; try++ {
		err := v.load(ctx, r.target.Monitor, state, "reset")
		if err == nil {
			break
		}
		if refused := new(qemu.LoadError); !errors.As(err, &refused) || try == resetTries || sleep(ctx, resetWait) != nil {
			return fmt.Errorf("reset the machine: %w", err)
		}
	}
	if err := v.closeLeftovers(ctx); err != nil {
		r.result.Warnings = append(r.result.Warnings, err.Error())
	}
	return r.o.step(StepReset)
}

// fillMemory puts all memory in.
func (r *restore) fillMemory(ctx context.Context) error {
	defer r.phase("memory")()
	r.report.phase("memory", int64(r.result.Memory.Bytes))
	holes, err := r.holes(ctx)
	if err != nil {
		return err
	}
	f := &filler{memory: r.memory, holes: holes, nonzero: r.memory.sets(), done: &r.report.done}
	if err := r.image.Load(ctx, image.LoadOptions{Parallel: r.o.Parallel}, f.put); err != nil {
		return err
	}
	r.nonzero = f.nonzero
	r.result.Memory.StoredBytes, r.result.Memory.UniformBytes = f.stored.Load(), f.uniform.Load()
	r.result.Memory.ZeroedBytes = f.zeroed.Load()
	return r.o.step(StepMemory)
}

// arm makes what is written from now on show. All that was written until now is as the image says: with the devices reset and the machine
// standing, nobody but us writes memory.
func (r *restore) arm(ctx context.Context) error {
	defer r.phase("arm")()
	harvest, err := r.session.HarvestLive(ctx)
	if err != nil {
		return err
	}
	if harvest.Unknown != nil {
		// All memory is compared then, as where there is no tracking at all.
		r.result.Warnings = append(r.result.Warnings, fmt.Sprintf("what the load writes cannot be seen: %v", harvest.Unknown))
	}
	return r.o.step(StepArmed)
}

// load loads the image's device state.
func (r *restore) load(ctx context.Context, v *vehicle) error {
	defer r.phase("load")()
	r.report.phase("loading", 0)
	state, err := devstate.Loadable(r.state, r.machineType)
	if err != nil {
		return err
	}
	if err := v.load(ctx, r.target.Monitor, state, "state"); err != nil {
		return err
	}
	return r.o.step(StepLoaded)
}

// finishMemory puts in again what the load has changed, and lets tracking count from the image.
func (r *restore) finishMemory(ctx context.Context) error {
	done := r.phase("settle")
	instant, err := r.settle(ctx)
	if err != nil {
		return err
	}
	done()
	if err := r.o.step(StepSettled); err != nil {
		return err
	}
	if r.o.FullCompare {
		done := r.phase("compare")
		if err := r.compareAll(ctx); err != nil {
			return err
		}
		done()
	}
	if err := r.o.step(StepCompared); err != nil {
		return err
	}
	if err := r.stillStands(ctx); err != nil {
		return err
	}
	if !r.target.Process.Alive() {
		return dirty.ErrGone
	}
	// Every page that was written since it was seen to be the image's shows as written: the next checkpoint can be an
	// increment on this image, by tracking.
	err = r.session.Sealed(instant, dirty.Image{Name: r.manifest.Name, Digest: r.image.Digest().String()})
	if err != nil {
		r.result.Tracking = err.Error()
	}
	return nil
}

// unmark takes the mark away: memory is right.
func (r *restore) unmark(dir *os.Root) error {
	if err := r.mark.remove(dir); err != nil {
		return err
	}
	r.mark = nil
	r.report.marked(false)
	return nil
}

// continueBound is how long a machine may take from cont to running.
const continueBound = 5 * time.Second

// run continues the machine.
func (r *restore) run(ctx context.Context) error {
	defer r.phase("run")()
	// Not ours to continue in any state but those that a restore leaves it in.
	running, err := r.checkState(ctx, true)
	if err != nil {
		return fmt.Errorf("continue the machine: %w", err)
	}
	if running {
		r.result.Resumed = true
		r.result.Warnings = append(r.result.Warnings, "somebody else continued the machine, after it was restored")
		return r.o.step(StepRunning)
	}
	if err := r.target.Monitor.Execute(ctx, "cont", nil, nil); err != nil {
		return fmt.Errorf("continue the machine: %w", err)
	}
	deadline := time.Now().Add(continueBound)
	for {
		state, err := qemu.Status(ctx, r.target.Monitor)
		switch {
		case err != nil:
			return err
		case state == qemu.StateRunning:
			r.result.Resumed = true
			return r.o.step(StepRunning)
		case time.Now().After(deadline):
			return fmt.Errorf("continue the machine: %w", &StateError{State: state})
		}
		time.Sleep(time.Millisecond)
	}
}

// leave ends a restore that failed: one that touched nothing lets the machine go on as it did, any other makes sure that it stands.
func (r *restore) leave(dir *os.Root, err error) error {
	if !r.target.Process.Alive() {
		if r.mark != nil {
			err = errors.Join(err, r.mark.remove(dir)) // it is of nothing any more
		}
		return fmt.Errorf("%w: %w", dirty.ErrGone, err)
	}
	if r.mark != nil {
		return &InvalidMemoryError{Mark: *r.mark, Err: errors.Join(err, r.watch.stopAgain())}
	}
	if !r.stopped || r.touched || r.invalid {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopBound)
	defer cancel()
	if wakeErr := wake(ctx, r.target.Monitor); wakeErr != nil {
		return &StoppedError{Err: err, Why: wakeErr} // the note stays, for whoever comes next
	}
	if noteErr := removeStop(dir, r.target.session()); noteErr != nil {
		return errors.Join(err, noteErr)
	}
	return err
}

// phase begins a phase and returns what ends it.
func (r *restore) phase(name string) func() {
	begin := time.Now()
	return func() { r.result.Phases = append(r.result.Phases, Phase{name, time.Since(begin)}) }
}
