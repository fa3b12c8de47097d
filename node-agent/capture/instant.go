package capture

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// poolBatches is how many batches are kept for the residue, 1 MiB each: what is copied into them goes to the compressors only once the
// machine runs again. It is well below what the writer has in all, which is 43 at the least: what goes beyond the pool needs some too.
const poolBatches = 24

// slowCopyTime is what a page is reckoned at for the bound of a hold whose residue is beyond its budget: copying then waits for the
// compressors and the volume.
const slowCopyTime = 8 * time.Microsecond

// instant tries once to bring the machine to its instant. On success the image has every page of it; on failure nothing of the attempt
// counts, and what it harvested is pending.
func (c *capture) instant(ctx context.Context) (*dirty.Instant, []byte, error) {
	c.report.phase("instant", 0)
	if err := settleDisks(ctx, c.target.Process, c.target.Monitor); err != nil {
		return nil, nil, err
	}
	if err := c.fillPool(ctx); err != nil {
		return nil, nil, err
	}
	w, err := c.arm(ctx)
	if unguardable := (*unguardableError)(nil); errors.As(err, &unguardable) && c.o.Instant == Late && ctx.Err() == nil {
		c.result.Lost = append(c.result.Lost, err.Error()) // it is all copied in the hold, where that is possible
		w, err = nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if w != nil {
		defer w.end() //nolint:errcheck // where it counts it was called before
	}
	// A look at all page tables right before the hold: they are in the processor's caches when it comes to it.
	if _, err := c.session.Estimate(ctx); err != nil {
		return nil, nil, err
	}
	var (
		instant *dirty.Instant
		residue dirty.Sets
		filled  []*image.Batch
	)
	begin := time.Now()
	stream, err := c.standStill(ctx, "instant", c.streamBytes, func(ctx context.Context, still *standstill) (err error) {
		if instant, err = c.session.HarvestStanding(ctx, still); err != nil {
			return err
		}
		still.part("scan")
		c.o.step(StepScanned)
		if residue, err = c.residue(instant); err != nil {
			return err
		}
		if w != nil {
			if err := w.begin(ctx, still, instant, residue); err != nil {
				return err
			}
			still.part("guard")
			c.o.step(StepKept)
		}
		if filled, err = c.copyResidue(ctx, still, residue); err != nil {
			return err
		}
		still.part("copy")
		c.o.step(StepResidue)
		if lost, err := instant.Rearm(ctx); err != nil {
			if lost != nil {
				// The guest ran again before it should have: copies of these pages may be older than their last writes, which do not show.
				c.copied.Subtract(lost)
			}
			return err
		}
		still.part("re-arm")
		c.o.step(StepRearmed)
		// Whoever takes tracking over, with a record elsewhere, takes our userfaultfd out first: the pages that it protected do not show here.
		if err := c.session.Tracked(); err != nil {
			return err
		}
		if err := c.layout.Check(c.target.Process); err != nil {
			return errors.Join(errChanged, err)
		}
		if held := c.o.Hooks.Held; held != nil {
			return held(ctx, c.layout)
		}
		return nil
	})
	if unproven := c.proveLog(ctx); err == nil {
		err = unproven
	}
	if err == nil {
		err = c.confirm(ctx, stream)
	}
	if err == nil {
		err = c.hearWitness(instant, w != nil)
	}
	if err != nil {
		for _, b := range filled {
			c.writer.Release(b)
		}
		return nil, nil, err
	}
	for _, b := range filled {
		c.writer.Submit(b)
	}
	c.copied.Union(residue)
	if w != nil {
		c.emptyPool() // the copying has a use for it
		if err := w.copy(); err != nil {
			return nil, nil, err
		}
		if err := w.end(); err != nil {
			return nil, nil, err
		}
		c.copied.Union(w.guarded)
		c.o.step(StepUnguarded)
	}
	for block, holes := range instant.Holes {
		for run := range holes.Runs() {
			c.writer.Absent(block, run, image.AbsentUnpopulated)
		}
	}
	c.result.Harvest.Residue = residue.Count()
	c.result.OwnerPaused = !c.running
	c.result.phase("instant", begin)
	return instant, stream, nil
}

// fillPool takes batches for the residue while the guest still runs, and touches their memory: neither waiting for one nor the kernel's
// first faults belong into the hold.
func (c *capture) fillPool(ctx context.Context) error {
	if err := c.writer.Flush(ctx); err != nil {
		return err
	}
	for len(c.pool) < poolBatches {
		b, err := c.writer.Batch(ctx)
		if err != nil {
			return err
		}
		populate(b.Data[:cap(b.Data)])
		c.pool = append(c.pool, b)
	}
	return nil
}

// populate brings memory in that a buffer has and was never used: in one system call, which takes a third of the time of a fault for
// each page. Linux before 5.14 does not know it.
func populate(p []byte) {
	if unix.Madvise(p, unix.MADV_POPULATE_WRITE) != nil {
		clear(p)
	}
}

// emptyPool gives the batches of the pool back.
func (c *capture) emptyPool() {
	for _, b := range c.pool {
		c.writer.Release(b)
	}
	c.pool = nil
}

// residue is what has to be copied in the hold: all that the image needs and that was not copied since it was last written.
func (c *capture) residue(instant *dirty.Instant) (dirty.Sets, error) {
	if instant.Unknown != nil {
		return nil, fmt.Errorf("tracking was lost: %w", instant.Unknown)
	}
	residue := instant.Pages.Clone()
	if c.parentAbsent != nil {
		// Nothing protects a hole, so what fills one shows as written. Should it not, it is copied all the same.
		residue.Union(c.parentAbsent)
	}
	c.copied.Subtract(instant.Written)
	residue.Subtract(c.copied)
	residue.Subtract(instant.Holes)
	return residue, nil
}

// copyResidue copies the residue, in the hold. What fits the pool is returned, to be submitted once the machine runs; what goes beyond
// is submitted as it comes, and waits for buffers.
func (c *capture) copyResidue(ctx context.Context, still *standstill, residue dirty.Sets) ([]*image.Batch, error) {
	pages := residue.Count()
	c.report.phase("instant", pages)
	if pages > c.o.budgetPages() {
		bound := c.o.HoldBound + time.Duration(pages)*slowCopyTime
		if time.Duration(pages)*copyTime > c.o.PauseBound {
			return nil, &ResidueError{pages, c.o.PauseBound}
		}
		if err := still.extend(min(bound, c.o.HoldBound+c.o.PauseBound)); err != nil {
			return nil, err
		}
	}
	var mu sync.Mutex
	var filled []*image.Batch
	give := func(ctx context.Context) (*image.Batch, error) {
		mu.Lock()
		if n := len(c.pool); n > 0 {
			b := c.pool[n-1]
			c.pool = c.pool[:n-1]
			mu.Unlock()
			return b, nil
		}
		// The pool is empty: what it held goes to the compressors, and comes back when they are done with it.
		for _, b := range filled {
			c.writer.Submit(b)
		}
		filled = nil
		mu.Unlock()
		return c.writer.Batch(ctx)
	}
	take := func(b *image.Batch) {
		mu.Lock()
		defer mu.Unlock()
		filled = append(filled, b)
	}
	if err := c.copyPages(ctx, residue, give, take, c.fill); err != nil {
		for _, b := range filled {
			c.writer.Release(b)
		}
		return nil, err
	}
	return filled, nil
}

// confirm asks, after the hold, whether anything changed beside it, so that the attempt does not count.
func (c *capture) confirm(ctx context.Context, stream []byte) error {
	before, expected := c.sections, c.streamBytes
	if err := c.learn(stream); err != nil {
		return err
	}
	if err := devstate.SameDevices(before, c.sections); err != nil {
		return fmt.Errorf("%w: %w (device state of %d bytes, %d before)", errChanged, err, len(stream), expected)
	}
	if err := c.sameMemory(ctx); err != nil {
		return err
	}
	ran := c.running
	if err := c.checkState(ctx); err != nil {
		return err
	}
	if c.running != ran {
		return fmt.Errorf("%w: it was running %v, and is running %v", errDisturbed, ran, c.running)
	}
	return c.sameMachine(ctx)
}
