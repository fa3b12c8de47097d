package capture

import (
	"context"
	"fmt"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

const (
	// maxRounds is how often pages are copied with the guest running: each further round only wins where the guest wrote little in
	// the one before.
	maxRounds = 2

	// longRound is how long a round takes at least for another to be worth its pause.
	longRound = 250 * time.Millisecond
)

// rounds copies what is dirty with the guest running, so that little is left for the hold.
func (c *capture) rounds(ctx context.Context) error {
	for round := 1; round <= maxRounds; round++ {
		begin := time.Now()
		if err := c.round(ctx); err != nil {
			return err
		}
		c.result.Harvest.Rounds = round
		c.result.phase(fmt.Sprintf("round %d", round), begin)
		if time.Since(begin) < longRound {
			return nil
		}
		again, err := c.dirtyNow(ctx)
		if err != nil || again <= c.o.budgetPages() {
			return err
		}
	}
	return nil
}

// dirtyNow estimates what an instant would have to copy now: what is dirty, less what was copied.
func (c *capture) dirtyNow(ctx context.Context) (uint64, error) {
	estimate, err := c.session.Estimate(ctx)
	if err != nil {
		return 0, err
	}
	return estimate - min(estimate, c.copied.Count()), nil
}

// round harvests live, waits for a standstill with drained I/O, and copies what was harvested, in this order: see the package's
// comment.
func (c *capture) round(ctx context.Context) error {
	c.report.phase("preparing", 0)
	harvest, err := c.session.HarvestLive(ctx)
	if err != nil {
		return err
	}
	if harvest.Unknown != nil {
		return fmt.Errorf("tracking was lost: %w", harvest.Unknown)
	}
	c.copied.Subtract(harvest.Written)
	c.o.step(StepHarvested)
	if err := c.barrier(ctx); err != nil {
		return err
	}
	c.o.step(StepBarrier)
	pages, err := c.copyable(ctx)
	if err != nil {
		return err
	}
	c.report.phase("copying", pages.Count())
	if err := c.copyPages(ctx, pages, c.writer.Batch, c.writer.Submit, c.fill); err != nil {
		return err
	}
	c.copied.Union(pages)
	c.result.Harvest.Live += pages.Count()
	c.o.step(StepCopied)
	return nil
}

// copyable are the pages worth copying with the guest running: pending, not copied since they were harvested, populated (reading an
// unpopulated page would populate it), and of a block whose later writes are seen.
func (c *capture) copyable(ctx context.Context) (dirty.Sets, error) {
	pages := c.session.Pending()
	pages.Subtract(c.copied)
	untracked := c.session.Untracked()
	for i, memory := range c.session.Memory() {
		if untracked[i] != nil {
			pages[i].Clear()
			continue
		}
		holes, err := memory.Unpopulated(ctx, c.pagemap)
		if err != nil {
			return nil, fmt.Errorf("block %s: %w", c.layout[i].Name, err)
		}
		pages[i].Subtract(holes)
	}
	return pages, nil
}

// barrier makes the machine stand still once, its I/O drained, and learns from it what its device state looks like.
func (c *capture) barrier(ctx context.Context) error {
	var last error
	for range c.o.Attempts {
		if err := settleDisks(ctx, c.target.Process, c.target.Monitor); err != nil {
			return err
		}
		stream, err := c.standStill(ctx, "barrier", 0, nil)
		if err == nil {
			return c.learn(stream)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !passing(err) {
			return err
		}
		last = err
		if err := c.checkState(ctx); err != nil {
			return err
		}
	}
	return &AttemptsError{c.o.Attempts, last}
}

// learn takes from a device state what the next hold needs to know.
func (c *capture) learn(stream []byte) error {
	parsed, err := devstate.Parse(stream)
	if err != nil {
		return fmt.Errorf("the device state that QEMU wrote: %w", err)
	}
	c.streamBytes, c.sections = uint64(len(stream)), parsed.Sections
	c.lookForNested(stream)
	return nil
}
