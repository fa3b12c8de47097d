package capture

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

const (
	// guardAlignBytes is what guarded areas are widened to, so that huge pages stay whole and areas few.
	guardAlignBytes = 2 << 20

	// guardBlockPages is how many pages a block has at the least to be worth a guard; smaller ones are copied in the hold.
	guardBlockPages = 256
)

// unguardableError says that there can be no guard here, before anything was guarded.
type unguardableError struct{ err error }

func (e *unguardableError) Error() string { return "memory cannot be guarded: " + e.err.Error() }
func (e *unguardableError) Unwrap() error { return e.err }

// errUnguarded says that a guarded page was changed past the guard.
var errUnguarded = errors.New("memory was changed past the guard")

// cow is the copy-on-write of one attempt: what is dirty and too much for the hold is guarded before it, and copied after it while the guest
// runs.
type cow struct {
	c     *capture
	guard *guard.Guard
	lent  dirty.Sets // to the guard

	// guarded are the pages to be copied after the hold; taken those that were, by whoever came first.
	guarded dirty.Sets
	mu      sync.Mutex
	taken   dirty.Sets
	caught  uint64 // of those, taken from the ring

	ctx      context.Context // of the copying; ends where draining fails
	cancel   context.CancelCauseFunc
	draining bool
	stopping atomic.Bool   // draining is to end
	drained  chan struct{} // closed when draining has ended
	ended    bool
}

// toGuard are the pages that the hold has no time to copy: what is dirty and populated, and not copied since. Nil where they fit it.
func (c *capture) toGuard(ctx context.Context) (dirty.Sets, error) {
	now, err := c.session.Look(ctx)
	if err != nil {
		return nil, err
	}
	pages := c.session.Pending()
	pages.Subtract(c.copied)
	pages.Union(now.Written)
	pages.Subtract(now.Holes)
	untracked := c.session.Untracked()
	for i, b := range c.blocks {
		if untracked[i] != nil || b.HostPageBytes > pageset.PageBytes || b.Pages() < guardBlockPages {
			pages[i].Clear()
		}
	}
	if pages.Count() <= c.o.budgetPages() {
		return nil, nil
	}
	limit, err := areaLimit(c.target.Process.PID)
	if err != nil {
		return nil, err
	}
	return widen(c.blocks, pages, limit), nil
}

// areaLimit is how many areas of a process may be guarded: a quarter of the mappings that it may have are ours at the most, and only of those
// that it does not have yet. A process that has no more left dies.
func areaLimit(pid int) (int, error) {
	const name = "/proc/sys/vm/max_map_count"
	text, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	mappings, err := pagetable.Maps(pid)
	if err != nil {
		return 0, err
	}
	return min(guard.MaxAreas, most/8, (most-len(mappings))/4), nil
}

// widen gives areas of guardAlignBytes that hold all the pages, limit of them at the most: the gaps between neighbours are filled from the
// smallest on.
func widen(blocks []dirty.Block, pages dirty.Sets, limit int) dirty.Sets {
	wide := dirty.NewSets(blocks)
	type gap struct {
		block int
		pageset.Run
	}
	var gaps []gap
	areas := 0
	for i, b := range blocks {
		const alignPages = guardAlignBytes / pageset.PageBytes
		shift := b.HVA / pageset.PageBytes % alignPages // of the block's first page within its aligned area
		for r := range pages[i].Runs() {
			first := (r.First + shift) / alignPages * alignPages
			end := (r.End() + shift + alignPages - 1) / alignPages * alignPages
			from, to := first-min(shift, first), min(end-shift, b.Pages())
			wide[i].Add(pageset.Run{First: from, Count: to - from})
		}
		var last uint64
		for r := range wide[i].Runs() {
			if areas++; last != 0 {
				gaps = append(gaps, gap{i, pageset.Run{First: last, Count: r.First - last}})
			}
			last = r.End()
		}
	}
	slices.SortFunc(gaps, func(a, b gap) int { return cmp.Compare(a.Count, b.Count) })
	for _, g := range gaps[:min(max(0, areas-limit), len(gaps))] {
		wide[g.block].Add(g.Run)
	}
	return wide
}

// ranges are the addresses of sets of pages.
func (c *capture) ranges(sets dirty.Sets) []guard.Range {
	var ranges []guard.Range
	for i, set := range sets {
		for r := range set.Runs() {
			ranges = append(ranges, rangeOf(c.blocks[i], r))
		}
	}
	return ranges
}

// rangeOf are the addresses of a run of a block's pages.
func rangeOf(b dirty.Block, r pageset.Run) guard.Range {
	return guard.Range{Start: b.HVA + r.First*pageset.PageBytes, End: b.HVA + r.End()*pageset.PageBytes}
}

// arm guards what the hold has no time to copy, with the guest running; nil where that is nothing. The guard lets every page go at once until
// the instant.
func (c *capture) arm(ctx context.Context) (_ *cow, err error) {
	if c.nested {
		return nil, nil // what hardware writes past the page tables would not wait
	}
	pages, err := c.toGuard(ctx)
	if err != nil || pages == nil {
		return nil, err
	}
	begin := time.Now()
	w := &cow{c: c, lent: pages, taken: dirty.NewSets(c.blocks), drained: make(chan struct{})}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.end())
		}
	}()
	if err := c.session.HoldOff(ctx, pages); err != nil {
		c.result.Lost = append(c.result.Lost, err.Error()) // what is given back all the same is found out, and costs the attempt
	}
	uffd, err := c.syncUserfaultfd(ctx)
	if err != nil {
		return nil, &unguardableError{err}
	}
	defer uffd.Close()
	if err := c.session.Lend(ctx, pages); err != nil {
		return nil, err
	}
	c.o.step(StepLent)
	o := guard.CopyOnWrite{PID: c.target.Process.PID, Userfaultfd: uffd.File, Areas: c.ranges(pages), WriteBound: c.o.WriteBound}
	if w.guard, err = o.Start(ctx); err != nil {
		return nil, err
	}
	c.result.Guard = &GuardReport{Areas: len(o.Areas), Pages: pages.Count()}
	if err := w.guard.Protect(ctx, o.Areas); err != nil {
		return nil, err
	}
	c.result.phase("guard", begin)
	go func() { // whoever waits for room in the image does not see it
		select {
		case <-w.guard.Gone():
			w.cancel(fmt.Errorf("%w: its keeper is gone", guard.ErrDropped))
		case <-w.ctx.Done():
		}
	}()
	c.o.step(StepGuarded)
	return w, nil
}

// syncUserfaultfd makes a userfaultfd for synchronous faults in the machine's process, which it is not open in any more when this returns.
func (c *capture) syncUserfaultfd(ctx context.Context) (*pagetable.Userfaultfd, error) {
	pid := c.target.Process.PID
	remote, local, err := inject.NewSyncUserfaultfd(ctx, pid)
	if err != nil {
		return nil, fmt.Errorf("make the guard's userfaultfd: %w", err)
	}
	uffd := &pagetable.Userfaultfd{File: local}
	_, err = uffd.API(pagetable.FeaturesGuard)
	// With another descriptor of it in the machine's process the guard would outlive its keeper, and the guest wait for nobody.
	if err = errors.Join(err, inject.CloseFD(ctx, pid, remote)); err != nil {
		uffd.Close()
		return nil, fmt.Errorf("make the guard's userfaultfd: %w", err)
	}
	return uffd, nil
}

// protectTime is what protecting a page again is reckoned at for the bound of a hold (measured: 2.7 µs).
const protectTime = 5 * time.Microsecond

// begin is called in the hold: what is guarded is to be as it is now. It takes from the residue what need not be copied in the hold.
func (w *cow) begin(ctx context.Context, still *standstill, instant *dirty.Instant, residue dirty.Sets) error {
	w.guarded = instant.Guarded.Clone()
	if err := w.guard.Instant(ctx); err != nil {
		return err
	}
	residue.Subtract(w.guarded)
	if residue.Count() > w.c.o.budgetPages() {
		// Written since the guard was armed, and let go. To protect a page again takes about as long as to copy it, and no buffer.
		again := residue.Clone()
		again.Intersect(w.lent)
		if err := still.extend(w.c.o.HoldBound + time.Duration(again.Count())*protectTime); err != nil {
			return err
		}
		if err := w.guard.Protect(ctx, w.c.ranges(again)); err != nil {
			return err
		}
		w.guarded.Union(again)
		residue.Subtract(again)
	}
	go w.drain()
	w.draining = true
	return nil
}

// drainPause is how long pages may gather in the ring before they are taken out, so that they come in batches.
const drainPause = 2 * time.Millisecond

// drain takes the pages that the guest was about to write out of the ring, until it is told to stop or the guard is gone. Its error ends the
// attempt.
func (w *cow) drain() {
	defer close(w.drained)
	for {
		if err := w.guard.Wait(); err != nil {
			if !w.stopping.Load() { // else what is left is taken by whoever stopped it
				w.cancel(err)
			}
			return
		}
		if w.guard.Filled() < image.BatchPages {
			time.Sleep(drainPause)
		}
		if err := w.empty(); err != nil {
			w.cancel(err)
			return
		}
	}
}

// empty takes out what is in the ring.
func (w *cow) empty() error {
	for {
		n, err := w.guard.Drain(image.BatchPages, w.store)
		if n == 0 || err != nil {
			return err
		}
	}
}

// store puts pages from the ring into the image, but for those that were copied already.
func (w *cow) store(pages []guard.Page) error {
	slices.SortFunc(pages, func(a, b guard.Page) int { return cmp.Compare(a.Address, b.Address) })
	for i, b := range w.c.blocks {
		var batch *image.Batch
		for _, p := range pages {
			if p.Address < b.HVA || p.Address >= b.End() {
				continue
			}
			page := (p.Address - b.HVA) / pageset.PageBytes
			if !w.take(i, page) {
				continue
			}
			w.caught++
			if omit := w.c.o.Hooks.Omit; omit != nil && omit(i, page) {
				continue
			}
			if batch == nil {
				var err error
				if batch, err = w.c.writer.Batch(w.ctx); err != nil {
					return err
				}
				batch.Block, batch.Pages, batch.Data = i, batch.Pages[:0], batch.Data[:0]
			}
			batch.Pages, batch.Data = append(batch.Pages, page), append(batch.Data, p.Content...)
		}
		if batch != nil {
			w.c.report.add(uint64(len(batch.Pages)))
			w.c.writer.Submit(batch)
		}
	}
	return nil
}

// take says whether a guarded page is the caller's to store: once.
func (w *cow) take(block int, page uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.guarded[block].Has(page) || w.taken[block].Has(page) {
		return false
	}
	w.taken[block].Add(pageset.Run{First: page, Count: 1})
	return true
}

// copy copies what is guarded, the guest running, and returns when all of it is in the image.
func (w *cow) copy() error {
	c := w.c
	begin := time.Now()
	c.report.phase("copying", w.guarded.Count())
	c.o.step(StepConfirmed)
	// What the guest is about to write comes by the ring meanwhile.
	if err := c.copyPages(w.ctx, w.guarded, c.writer.Batch, c.writer.Submit, w.fill); err != nil {
		if cause := context.Cause(w.ctx); cause != nil {
			return cause // that the copying was ended says nothing
		}
		return err
	}
	c.o.step(StepTaken)
	if err := w.guard.Flush(w.ctx); err != nil {
		return err
	}
	w.stop()
	// Pages of a batch that draining could not get are marked as taken.
	if cause := context.Cause(w.ctx); cause != nil {
		return cause
	}
	if err := w.empty(); err != nil {
		return err
	}
	missing := w.guarded.Clone()
	missing.Subtract(w.taken)
	for i, set := range missing {
		for r := range set.Runs() {
			// What the kernel has to say of the page may tell who did it.
			at, found := rangeOf(c.blocks[i], r), pagetable.Categories(0)
			c.pagemap.Scan(pagetable.ScanArgs{Start: at.Start, End: at.Start + pageset.PageBytes, ReturnMask: ^pagetable.Categories(0) >> 56}, //nolint:errcheck // see above
				func(r pagetable.Region) error { found = r.Categories; return nil })
			return fmt.Errorf("%w: %d pages, first page %#x of block %s, of categories %#x", errUnguarded, missing.Count(), r.First, c.blocks[i].Name, uint64(found))
		}
	}
	c.result.phase("copy on write", begin)
	return nil
}

// fill reads a piece of guarded memory into a batch. What is not protected any more afterwards, or never was, comes by the ring.
func (w *cow) fill(b *image.Batch, p piece) error {
	c := w.c
	if err := c.fill(b, p); err != nil {
		return err
	}
	if omit := c.o.Hooks.Omit; omit != nil { // what is left out on purpose is not missed here
		for _, run := range p.runs {
			for page := run.First; page < run.End(); page++ {
				if omit(p.block, page) {
					w.take(p.block, page)
				}
			}
		}
	}
	block := c.blocks[p.block]
	still := map[uint64]bool{}
	var ranges []guard.Range
	for _, run := range p.runs {
		r := rangeOf(block, run)
		ranges = append(ranges, r)
		// The pages' own entries, and not a scan: that has it that pages are not written in memory that nobody guards any more, from Linux 7.3
		// on, where it was the other way round before (measured on 7.3.4 and 6.12.95).
		err := c.pagemap.Entries(r.Start, r.End, func(at uint64, entries []pagetable.Entry) error {
			for i, e := range entries {
				if e.WriteProtected() && (e.Present() || e.Swapped()) {
					still[(at-block.HVA)/pageset.PageBytes+uint64(i)] = true
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("see whether pages of block %s are guarded: %w", block.Name, err)
		}
	}
	kept := 0
	for i, page := range b.Pages {
		if !still[page] || !w.take(p.block, page) {
			continue
		}
		if kept != i {
			copy(b.Data[kept*pageset.PageBytes:], b.Data[i*pageset.PageBytes:][:pageset.PageBytes])
		}
		b.Pages[kept] = page
		kept++
	}
	b.Pages, b.Data = b.Pages[:kept], b.Data[:kept*pageset.PageBytes]
	return w.guard.Taken(ranges)
}

// stop ends draining.
func (w *cow) stop() {
	if w.draining {
		w.stopping.Store(true)
		w.guard.StopWaiting()
		<-w.drained
		w.draining = false
	}
}

// end lets everything go and puts it under tracking again. It may be called more than once.
func (w *cow) end() error {
	if w.ended {
		return nil
	}
	w.ended = true
	w.cancel(errEnded)
	var err error
	if w.guard != nil {
		w.stop()
		// Whether or not the worker is to go on, the guest is not to wait for the kernel to lift it all at once.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), guard.EndBound(w.lent.Count()*pageset.PageBytes))
		defer cancel()
		if err = w.guard.End(ctx); errors.Is(err, guard.ErrDropped) {
			err = nil // it has ended by itself
		}
		w.c.result.Guard.Faults = w.guard.Faults()
		w.c.result.Guard.Caught = w.caught
		w.c.result.Guard.Guarded = w.guarded.Count()
		w.guard.Close()
	}
	err = errors.Join(err, w.c.session.TakeBack())
	w.letBe()
	return err
}

// letBe lets memory be given back and merged again. What cannot be undone now the next capture undoes, or a release: the record says so, and no
// image is worse for it.
func (w *cow) letBe() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), guard.EndBound(w.lent.Count()*pageset.PageBytes))
	defer cancel()
	if err := w.c.session.LetBe(ctx); err != nil {
		w.c.result.Lost = append(w.c.result.Lost, err.Error())
	}
}
