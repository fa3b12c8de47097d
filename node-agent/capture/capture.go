package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// Attributes that every image of a machine carries.
const (
	AttributeGuest = "vm.name"
	AttributeUUID  = "vm.uuid"
)

// CheckAttributes refuses attributes in place of those that every image carries: the machine's next image would not find its parent by them, or
// another machine's would.
func CheckAttributes(attributes map[string]string) error {
	for _, name := range []string{AttributeGuest, AttributeUUID} {
		if _, ok := attributes[name]; ok {
			return fmt.Errorf("attribute %s says which machine an image is of, and cannot be given", name)
		}
	}
	return nil
}

// capture is one checkpoint under way.
type capture struct {
	target Target
	repo   *image.Repository
	o      Options
	result *Result
	report *reporter

	running bool // the machine ran when the checkpoint began, and is to run afterwards
	layout  qemu.Layout
	blocks  []dirty.Block
	machine qemu.Machine

	session *dirty.Session
	memory  *pagetable.Memory
	pagemap *pagetable.Pagemap
	writer  *image.Writer
	pool    []*image.Batch // taken for the residue before the machine is stopped

	// parentAbsent are the pages that the parent image has no content for: populated now, they are dirty whatever tracking
	// says. Nil where everything is looked at anyway.
	parentAbsent dirty.Sets

	// copied are the pages that were copied since they were last harvested, with a standstill between the two.
	copied dirty.Sets

	// What the leash needs to know: the pipe inside QEMU, and what the device state looked like the last time.
	pipe        inject.RemoteFile
	streamBytes uint64
	sections    []devstate.Section
	nested      bool // the guest runs guests of its own
	distrusted  bool // the session's sources are not trusted
	unanswered  bool // a command that writes into the pipe may still come to QEMU
}

// Run takes a checkpoint of the target and seals it as an image in the repository. Whatever the error, the machine goes on as before,
// and there is no image of that name; but for an error after sealing, which names it.
func Run(ctx context.Context, target Target, repo *image.Repository, o Options) (_ *Result, err error) {
	defer func() {
		if err != nil && !target.Process.Alive() && !errors.Is(err, dirty.ErrGone) {
			err = fmt.Errorf("%w: %w", dirty.ErrGone, err) // what went wrong did so because of that
		}
		if err != nil {
			err = fmt.Errorf("capture %v: %w", target.Process, err)
		}
	}()
	o = o.withDefaults()
	result := Result{Image: o.Name, Began: time.Now()}
	err = once(ctx, target, repo, o, &result)
	// Some damage to the parent shows only when a page is compared with it. A new base needs nothing of it.
	if parent := new(image.ParentError); errors.As(err, &parent) && o.Mode == Auto && result.Parent != "" && ctx.Err() == nil {
		o.Mode = Full
		result = Result{Image: o.Name, Began: result.Began, Pauses: result.Pauses, Downtime: result.Downtime, Why: "a base: " + parent.Error()}
		err = once(ctx, target, repo, o, &result)
	}
	if err != nil {
		return nil, err
	}
	return &result, nil
}

// once takes a checkpoint in the mode it is asked for, and adds to the result.
func once(ctx context.Context, target Target, repo *image.Repository, o Options, result *Result) error {
	c := &capture{target: target, repo: repo, o: o, result: result}
	if err := image.CheckName(o.Name); err != nil {
		return err
	}
	if err := CheckAttributes(o.Attributes); err != nil {
		return err
	}
	c.report = newReporter(c.o.Progress)
	defer c.report.stop()
	defer c.close()
	c.o.step(StepBegun)
	if err := c.prepare(ctx); err != nil {
		return err
	}
	instant, stream, err := c.take(ctx)
	if err != nil {
		return err
	}
	return c.seal(ctx, instant, stream)
}

// prepare refuses what cannot be captured, and opens all that the checkpoint works with. The guest notices nothing of it, but for one
// stop of QEMU's main thread (0.1–0.3 ms) the first time.
func (c *capture) prepare(ctx context.Context) error {
	c.report.phase("preparing", 0)
	p, m := c.target.Process, c.target.Monitor
	if err := c.checkState(ctx); err != nil {
		return err
	}
	var err error
	if c.layout, err = qemu.ReadLayout(ctx, m, p); err != nil {
		return err
	}
	if c.machine, c.blocks, err = c.describe(ctx); err != nil {
		return err
	}
	if c.memory, err = pagetable.OpenMemory(p.PID); err != nil {
		return err
	}
	if c.pagemap, err = pagetable.OpenPagemap(p.PID); err != nil {
		return err
	}
	witness, err := c.witnessRanges(ctx)
	if err != nil {
		return err
	}
	c.session, err = dirty.Open(ctx, dirty.Process{PID: p.PID, StartTime: p.StartTime}, c.blocks, c.o.RecordDir, dirty.Options{Witness: witness, WitnessBound: c.o.HoldBound / 4})
	if err != nil {
		return err
	}
	c.nested = c.session.RanNested()
	if admit := c.o.Admit; admit != nil {
		if err := admit(); err != nil {
			return err
		}
	}
	if err := c.session.LetBe(ctx); err != nil { // what a capture that was killed has left
		return err
	}
	c.copied = dirty.NewSets(c.blocks)
	if err := c.createImage(ctx); err != nil {
		return err
	}
	c.report.attach(c.writer.Progress)
	return c.prepareLeash(ctx)
}

// describe refuses what cannot be captured, and says what the machine is.
func (c *capture) describe(ctx context.Context) (machine qemu.Machine, blocks []dirty.Block, err error) {
	p, m := c.target.Process, c.target.Monitor
	if err := qemu.Capturable(ctx, m, p, c.layout); err != nil {
		return machine, nil, err
	}
	if machine, err = qemu.Describe(ctx, m, p); err != nil {
		return machine, nil, err
	}
	blocks, err = dirty.Blocks(ctx, m, c.layout)
	return machine, blocks, err
}

// checkState refuses a machine that does not run, was not paused by its owner, or is being migrated.
func (c *capture) checkState(ctx context.Context) error {
	state, err := qemu.Status(ctx, c.target.Monitor)
	if err != nil {
		return err
	}
	if state != qemu.StateRunning && state != qemu.StatePaused {
		return &StateError{state}
	}
	c.running = state == qemu.StateRunning
	return c.checkMigration(ctx)
}

func (c *capture) checkMigration(ctx context.Context) error {
	migration, err := qemu.Migration(ctx, c.target.Monitor)
	if err != nil {
		return err
	}
	if !migration.Status.Idle() {
		return fmt.Errorf("%w: its status is %q", ErrMigrating, string(migration.Status))
	}
	return nil
}

// prepareLeash makes the pipe inside QEMU, or finds the one of the last checkpoint.
func (c *capture) prepareLeash(ctx context.Context) (err error) {
	pid := c.target.Process.PID
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	// After a checkpoint that was killed, a command of then may still wait in libvirt, and must not find a reader. After any other, nothing
	// can be on its way into the pipe.
	old := c.session.Leash()
	var abandoned *inject.RemoteFile
	if old != nil && !old.Idle {
		abandoned = &old.Pipe
	}
	if err := c.session.AbandonPipe(ctx, abandoned, time.Duration(now.Nano())); err != nil {
		return err
	}
	if old != nil && old.Idle && old.Pipe.Check(pid) == nil {
		c.pipe = old.Pipe
		if len(old.Sections) != 0 { // else nobody has seen a device state since: a barrier will
			c.streamBytes = uint64(old.StreamBytes)
			if err := json.Unmarshal(old.Sections, &c.sections); err != nil {
				return fmt.Errorf("the device sections of the session record: %w", err)
			}
		}
		inUse := *old
		inUse.Idle = false
		return c.session.SetLeash(&inUse)
	}
	if c.pipe, err = inject.NewPipe(ctx, pid); err != nil {
		return fmt.Errorf("make the leash's pipe: %w", err)
	}
	// In the record at once, and not as idle: whoever comes after a crash leaves it alone.
	return c.session.SetLeash(&dirty.Leash{Pipe: c.pipe})
}

// take brings the machine to its instant and returns that and its device state.
func (c *capture) take(ctx context.Context) (*dirty.Instant, []byte, error) {
	estimate, err := c.session.Estimate(ctx)
	if err != nil {
		return nil, nil, err
	}
	c.result.Harvest.Estimated = estimate
	// On the disk before anything is re-armed, and before the machine is held.
	if err := c.session.Invalidate(ctx); err != nil {
		return nil, nil, err
	}
	c.o.step(StepInvalidated)
	switch {
	case c.o.Instant == Late && (estimate > c.o.budgetPages() || c.streamBytes == 0):
		err = c.rounds(ctx)
	case c.streamBytes == 0: // the hold needs to know what the device state looks like
		err = c.barrier(ctx)
	}
	if err != nil {
		return nil, nil, err
	}
	var last error
	for attempt := 1; attempt <= c.o.Attempts; attempt++ {
		c.result.Attempts = attempt
		instant, stream, err := c.instant(ctx)
		if err == nil {
			return instant, stream, nil
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		if !passing(err) {
			return nil, nil, err
		}
		last = err
		c.result.Lost = append(c.result.Lost, err.Error())
		if c.result.held() > c.o.PauseBound {
			return nil, nil, &AttemptsError{attempt, last}
		}
		if err := c.again(ctx, last); err != nil {
			return nil, nil, err
		}
	}
	return nil, nil, &AttemptsError{c.o.Attempts, last}
}

// again prepares for another attempt after one that failed.
func (c *capture) again(ctx context.Context, failed error) error {
	// What made it fail may have been the beginning of something that refuses the machine altogether.
	if err := c.checkState(ctx); err != nil {
		return err
	}
	if err := c.sameMemory(ctx); err != nil {
		return err
	}
	var err error
	// Devices may come and go between two attempts, but not within one.
	if c.machine, err = c.describeAgain(ctx); err != nil {
		return err
	}
	left, err := c.dirtyNow(ctx)
	if err != nil {
		return err
	}
	switch {
	case left > c.o.budgetPages():
		return c.rounds(ctx) // what the attempt has copied does not count; it is not to be copied in the next hold
	case errors.Is(failed, guard.ErrNotHeld):
		return c.barrier(ctx) // the device state is shorter than it was known to be
	}
	return nil
}

// passing says whether an attempt may hold the next time.
func passing(err error) bool {
	var refused *qemu.QMPError
	return errors.Is(err, guard.ErrLetGo) || errors.Is(err, guard.ErrNotHeld) || errors.Is(err, errDisturbed) ||
		errors.Is(err, guard.ErrDropped) || errors.Is(err, errUnguarded) || errors.Is(err, dirty.ErrBroken) || errors.Is(err, errEnded) || errors.Is(err, errChanged) || errors.As(err, &refused)
}

// sameMachine makes sure that the machine is the one that the checkpoint describes, its devices above all: one that was plugged in or out
// would be in the device state and not in the description, or the other way round, and one that cannot be captured would go unseen.
func (c *capture) sameMachine(ctx context.Context) error {
	machine, err := c.describeAgain(ctx)
	if err != nil {
		return err
	}
	for _, d := range qemu.Compare(c.machine, machine) {
		if d.Fatal {
			return fmt.Errorf("%w: %v", errChanged, d)
		}
	}
	return nil
}

// describeAgain is describe in the course of a checkpoint: what can be told of the RAM blocks has to be what it was in the beginning.
func (c *capture) describeAgain(ctx context.Context) (qemu.Machine, error) {
	machine, blocks, err := c.describe(ctx)
	if err == nil && !slices.Equal(blocks, c.blocks) {
		err = fmt.Errorf("%w: what can be told of its RAM blocks is not what could be at the beginning", errChanged)
	}
	return machine, err
}

// sameMemory makes sure that the machine's RAM blocks are those that the checkpoint began with.
func (c *capture) sameMemory(ctx context.Context) error {
	now, err := qemu.ReadLayout(ctx, c.target.Monitor, c.target.Process)
	if err != nil {
		return err
	}
	if !now.Equal(c.layout) {
		return fmt.Errorf("%w: its RAM blocks are others than at the beginning", errChanged)
	}
	return nil
}

// seal ends the image, and then the session record that names it.
func (c *capture) seal(ctx context.Context, instant *dirty.Instant, stream []byte) error {
	c.o.step(StepSealing)
	c.report.phase("sealing", 0)
	c.emptyPool() // sealing needs batches of its own
	begin := time.Now()
	if err := c.writer.Flush(ctx); err != nil {
		return err
	}
	c.result.phase("write", begin)
	c.result.Duration = time.Since(c.result.Began) // but for the sealing itself: the report is part of what is sealed
	report, err := json.Marshal(c.result)
	if err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	attributes := map[string]string{AttributeGuest: c.target.Process.Guest, AttributeUUID: c.target.Process.UUID}
	for k, v := range c.o.Attributes {
		attributes[k] = v
	}
	machine, err := json.Marshal(c.machine)
	if err != nil {
		return fmt.Errorf("encode the machine's description: %w", err)
	}
	begin = time.Now()
	img, err := c.writer.Seal(ctx, image.Contents{DeviceState: stream, Machine: machine, Attributes: attributes, Report: report})
	if err != nil {
		return err
	}
	defer img.Close()
	c.o.step(StepSealed)
	manifest := img.Manifest()
	c.result.Digest, c.result.Pages = img.Digest(), manifest.Pages
	if err := c.rememberLeash(); err != nil {
		return fmt.Errorf("image %s is sealed, but the next one cannot be made by tracking: %w", c.o.Name, err)
	}
	// Where pages are known to this worker alone the record stays invalid: the next checkpoint will compare.
	err = c.session.Sealed(instant, dirty.Image{Name: c.o.Name, Digest: img.Digest().String()})
	var unknown *dirty.UnknownError
	if err != nil && !errors.As(err, &unknown) {
		return fmt.Errorf("image %s is sealed, but the next one cannot be made by tracking: %w", c.o.Name, err)
	}
	c.result.phase("seal", begin)
	c.result.Duration = time.Since(c.result.Began)
	c.o.step(StepRecorded)
	return nil
}

// rememberLeash keeps in the record what the next checkpoint needs to hold the machine without a pause to find it out.
func (c *capture) rememberLeash() error {
	sections, err := json.Marshal(c.sections)
	if err != nil {
		return fmt.Errorf("encode the device sections: %w", err)
	}
	return c.session.SetLeash(&dirty.Leash{Pipe: c.pipe, Idle: true, StreamBytes: int64(c.streamBytes), Sections: sections})
}

// close frees everything. An image that was not sealed is gone then.
func (c *capture) close() {
	if c.writer != nil {
		c.emptyPool()
		c.writer.Abort() //nolint:errcheck // what it leaves is swept
	}
	if c.session != nil {
		if leash := c.session.Leash(); leash != nil && leash.Pipe == c.pipe && !leash.Idle && !c.unanswered {
			idle := *leash
			idle.Idle = true
			c.session.SetLeash(&idle) //nolint:errcheck // the next one makes another
		}
		c.session.Close() //nolint:errcheck // the record was written where it counts
	}
	if c.memory != nil {
		c.memory.Close()
	}
	if c.pagemap != nil {
		c.pagemap.Close()
	}
}

func (r *Result) phase(name string, begin time.Time) {
	r.Phases = append(r.Phases, Phase{name, time.Since(begin)})
}
