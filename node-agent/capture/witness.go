package capture

import (
	"context"
	"fmt"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// KVM's dirty log beside the page tables, and guests that run guests of their own, for which there has to be one.

// witnessRanges are the ranges that KVM's dirty log is to be kept of: none where that is not asked for, or the machine does not run under KVM.
func (c *capture) witnessRanges(ctx context.Context) ([]qemu.GuestRange, error) {
	if !c.o.Witness {
		return nil, nil
	}
	return qemu.GuestRanges(ctx, c.target.Monitor, c.layout)
}

// proveLog makes sure, after a hold in which the log was cleared, that no migration rests on it.
func (c *capture) proveLog(ctx context.Context) error {
	if !c.session.Unproven() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wakeBound) // whatever becomes of the checkpoint
	defer cancel()
	migration, err := qemu.Migration(ctx, c.target.Monitor)
	if err != nil {
		return fmt.Errorf("see whether a migration began: %w", err)
	}
	return c.session.Migration(ctx, !migration.Status.Idle())
}

// lookForNested finds out from a device state whether the guest runs guests of its own. For those the processor writes pages (a virtual APIC,
// posted interrupts) that KVM has mapped for it, past all page tables: only KVM's log knows of them. Without it nothing is known to be clean,
// and everything has to be copied while the machine stands still.
func (c *capture) lookForNested(stream []byte) {
	c.nested = devstate.HasNestedGuests(stream) || c.o.Hooks.Nested
	c.session.Nested(c.nested)
	if c.nested && !c.session.Witnessed() {
		c.distrust()
	}
}

func (c *capture) distrust() {
	if c.distrusted {
		return
	}
	c.distrusted = true
	c.session.Distrust()
	c.because("the guest runs guests of its own, for which hardware writes memory unseen, and there is no KVM dirty log of that; all memory is copied in the pause")
	if c.result.Source != "" {
		c.result.Source = sourceContentHash
	}
}

const sourceContentHash = "content hash"

// hearWitness judges an instant by what the witness has to say, and reports it. An error means that it does not count.
func (c *capture) hearWitness(instant *dirty.Instant, guarded bool) error {
	compared := instant.Compared
	if c.nested && !instant.Doubted && (guarded || compared == nil || !compared.Whole) {
		if !guarded {
			c.distrust()
		}
		return fmt.Errorf("%w: it was found to run guests of its own", errChanged)
	}
	if !c.o.Witness {
		return nil
	}
	report := &WitnessReport{Compared: compared != nil, Nested: c.nested}
	c.result.Witness = report
	took := c.session.LogTimes()
	report.Find, report.Read, report.Clear = took.Find, took.Read, took.Clear
	switch unwitnessed := c.session.Unwitnessed(); {
	case unwitnessed != nil:
		report.Why = unwitnessed.Error()
	case compared == nil:
		report.Why = "KVM's dirty log does not count from the last checkpoint"
	}
	if compared == nil {
		return nil
	}
	report.Unseen, report.Missed = compared.Unseen, compared.Missed.Count()
	report.First = firstPage(c.blocks, compared.Missed)
	if compared.Alarm() {
		c.because(fmt.Sprintf("%d pages are in the KVM dirty log and not in the page tables, first %s; all memory is copied in the pause", report.Missed, report.First))
		if c.result.Source != "" {
			c.result.Source = sourceContentHash
		}
	}
	return nil
}

// firstPage names the first page of the sets; "" where there is none.
func firstPage(blocks []dirty.Block, sets dirty.Sets) string {
	for i, set := range sets {
		for run := range set.Runs() {
			return fmt.Sprintf("page %#x of block %s", run.First, blocks[i].Name)
		}
	}
	return ""
}
