package dirty

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/evict"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// PageTables tracks writes by the process's page tables: userfaultfd in asynchronous write-protect mode, read by
// PAGEMAP_SCAN. It sees vCPUs, device emulation and vhost, whoever writes through QEMU's address space, at 4 KiB (at
// the huge page's size on hugetlbfs).
//
// How a page's state is to be read, from the categories of PAGEMAP_SCAN:
//
//	present or swapped, not written   protected and untouched since: clean
//	present or swapped, written       dirty
//	neither                           private memory: a hole.
//	                                  shared memory: a hole of the file, or a page that no page table maps and whose
//	                                  state is therefore lost: it was written and then unmapped (reclaimed, discarded from the page
//	                                  table only, a huge page split). Dirty.
//
// Linux 6.18 reports what is neither as written, 6.12 does not; what is not present is asked for by itself, so that
// nothing depends on it.
//
// Shared memory has one more state: a protection outlives the page when a hole is punched (it then shows as swapped,
// not written), and a read that fills the hole with zeros again takes the protection over. The page has changed and
// shows as clean. As nothing in the page tables tells, shared blocks that something may punch holes into are not
// tracked ([Block.Discards]).
type PageTables struct {
	blocks  []Block
	tracked []*evict.Memory // nil for blocks that this source does not cover
	lent    Sets            // pages that a guard has: what is written to them does not show, see [Session.Lend]
	pagemap scanner
	uffd    registrar
	maps    func([]pagetable.Range) ([]pagetable.Mapping, error)
}

// scanner is the pagemap of the process, used by several goroutines at once; tests put a faulty one in its place.
type scanner interface {
	Scan(pagetable.ScanArgs, func(pagetable.Region) error) error
}

// registrar is the userfaultfd in the process.
type registrar interface {
	Register(start, length uint64, mode pagetable.Mode) error
}

const (
	populated = pagetable.CategoryPresent | pagetable.CategorySwapped
	written   = pagetable.CategoryWritten
)

// pageTablesName names the source in reports.
const pageTablesName = "page tables"

// Name is "page tables".
func (t *PageTables) Name() string { return pageTablesName }

// Complete says whether the block is tracked.
func (t *PageTables) Complete(block int) bool { return t.tracked[block] != nil }

// Arm registers all tracked blocks. Nothing is protected here: every populated page of a newly registered range shows
// as written until a harvest takes it.
func (t *PageTables) Arm(ctx context.Context) error {
	for i, b := range t.blocks {
		if t.tracked[i] == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.uffd.Register(b.HVA, b.Bytes, pagetable.ModeWriteProtect); err != nil {
			return fmt.Errorf("arm tracking of block %s: %w: %w", b.Name, ErrUntracked, err)
		}
	}
	return nil
}

// Estimate counts the written pages.
func (t *PageTables) Estimate(ctx context.Context) (uint64, error) {
	found, err := t.look(ctx)
	if err != nil {
		return 0, err
	}
	return found.Written.Count(), nil
}

// HarvestLive looks for the written pages without protecting, and then runs a scan that protects and reports in one
// step over the spans where there are some. Only what the second one reports counts: between the two the guest goes
// on writing.
func (t *PageTables) HarvestLive(ctx context.Context) (Sets, error) {
	found, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	rearmed, err := t.protect(ctx, found.Written, nil)
	if err != nil {
		return nil, err
	}
	// What is in the file and in no page table cannot be protected (and is not reported by protect): it stays dirty,
	// and belongs into this harvest too, as the look is no older than the harvest.
	rearmed.Union(found.Written)
	return rearmed, nil
}

// HarvestStanding looks for the written pages and the holes.
func (t *PageTables) HarvestStanding(ctx context.Context, still Standstill) (*Standing, error) {
	if err := still.Err(); err != nil {
		return nil, fmt.Errorf("harvest page tables: %w", err)
	}
	found, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	found.rearm = func(ctx context.Context) (Sets, error) {
		own := found.Written.Clone()
		own.Subtract(t.lent)
		return t.protect(ctx, own, found.Holes)
	}
	return found, nil
}

// look reads the state of every page and changes nothing.
func (t *PageTables) look(ctx context.Context) (*Standing, error) {
	found := &Standing{Written: make(Sets, len(t.blocks)), Holes: make(Sets, len(t.blocks)), Guarded: make(Sets, len(t.blocks))}
	for i, b := range t.blocks {
		memory := t.tracked[i]
		if memory == nil {
			continue
		}
		w, holes, guarded := pageset.New(b.Pages()), pageset.New(b.Pages()), pageset.New(b.Pages())
		found.Written[i], found.Holes[i], found.Guarded[i] = w, holes, guarded
		own := cut(without([]span{{b.HVA, b.End()}}, b, t.lent[i]), lookSpanBytes, lookSpanBytes)
		args := pagetable.ScanArgs{
			// Without this the kernel passes over memory that is not tracked as if nothing had been written there.
			CheckAsync: true,
			// Written, or not present: one walk for both, which passes over clean pages at 3 ns each.
			CategoryInverted: pagetable.CategoryPresent,
			CategoryAnyOf:    written | pagetable.CategoryPresent,
			ReturnMask:       written | populated,
		}
		err := t.scan(ctx, own, args, func(r pagetable.Region) error {
			return classify(memory, b.run(r.Start, r.End), r.Categories, w.Add, holes.Add)
		})
		if err != nil {
			return nil, t.untracked("look for written pages of", b, err)
		}
		// Whatever is populated there may have been written since it was lent. A guard's protection shows as tracking's does, as long as there is
		// the guard: who relies on it asks once more.
		args = pagetable.ScanArgs{ReturnMask: written | populated}
		lent := cut(spansOf(b, t.lent[i]), lookSpanBytes, lookSpanBytes)
		err = t.scan(ctx, lent, args, func(r pagetable.Region) error {
			run := b.run(r.Start, r.End)
			c := r.Categories | written
			keep := func(pageset.Run) {}
			if r.Categories&populated != 0 && r.Categories&written == 0 {
				keep = guarded.Add
			}
			if c&pagetable.CategoryPresent == 0 && memory.Backing != evict.Anonymous {
				c &^= populated // a guard's protection is put onto the holes of shared memory too: its file tells which they are
			}
			return classify(memory, run, c, func(r pageset.Run) { w.Add(r); keep(r) }, holes.Add)
		})
		if err != nil {
			return nil, fmt.Errorf("look at the guarded pages of block %s: %w", b.Name, err)
		}
	}
	return found, t.mapped()
}

// lookSpanBytes is what one processor looks through at a time: half a millisecond at 4 KiB a page.
const lookSpanBytes = 128 << 20

// scan scans the spans, on all processors: in a standstill the guest has no use for them, and waits. visit is called by one goroutine
// at a time, in no order.
func (t *PageTables) scan(ctx context.Context, spans []span, args pagetable.ScanArgs, visit func(pagetable.Region) error) error {
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, s := range spans {
		part := args
		part.Start, part.End = s.start, s.end
		group.Go(func() error {
			return t.pagemap.Scan(part, func(r pagetable.Region) error {
				if err := ctx.Err(); err != nil {
					return err
				}
				mu.Lock()
				defer mu.Unlock()
				return visit(r)
			})
		})
	}
	return group.Wait()
}

// classify sorts a run of pages with the same categories by the table above. Pages that it gives to neither are clean.
func classify(memory *evict.Memory, run pageset.Run, c pagetable.Categories, dirty, hole func(pageset.Run)) error {
	switch {
	case c&populated != 0 && c&written != 0:
		dirty(run)
		return nil
	case c&pagetable.CategoryPresent != 0:
		return nil
	case c&pagetable.CategorySwapped != 0:
		// Clean, unless a hole was punched and only the protection is left. (Private memory has no such protections,
		// as holes are never armed: there Holes would call the whole run unpopulated.)
		if memory.Backing == evict.Anonymous {
			return nil
		}
		return memory.Holes(run, hole)
	}
	// Dirty is what is left of the run between the holes.
	at := run.First
	err := memory.Holes(run, func(h pageset.Run) {
		if h.First > at {
			dirty(pageset.Run{First: at, Count: h.First - at})
		}
		hole(h)
		at = h.End()
	})
	if err == nil && at < run.End() {
		dirty(pageset.Run{First: at, Count: run.End() - at})
	}
	return err
}

// protect protects what is written in the spans around the pages of sets, and reports what it protected. There is no
// other way in this package that protects anything: every page that becomes protected is reported by the system call
// that did it, so a write between the look and the protecting is never lost.
//
// holes, where it is not nil, are known to stay the only ones until it returns, for the machine stands still. Spans of private memory without
// any are protected by the kernel's fast path (fs/proc/task_mmu.c, pagemap_scan_pmd_entry), which takes half as long and does not tell a hole
// from a written page. Should one appear all the same, it is reported, and the standstill was none.
func (t *PageTables) protect(ctx context.Context, sets, holes Sets) (Sets, error) {
	rearmed := make(Sets, len(t.blocks))
	for i, b := range t.blocks {
		if t.tracked[i] == nil {
			continue
		}
		set := pageset.New(b.Pages())
		rearmed[i] = set
		align := max(spanAlignBytes, b.HostPageBytes)
		args := pagetable.ScanArgs{
			WriteProtect: true,
			CheckAsync:   true,
			// Present or swapped, so that holes are not armed: a hole under protection shows as swapped ever
			// after, and memory populated there gets no huge pages. Asking for written pages alone would arm the
			// holes between them (the kernel's fast path takes an empty entry for a written page).
			CategoryMask:  written,
			CategoryAnyOf: populated,
			ReturnMask:    written,
		}
		fast := args
		fast.CategoryAnyOf = 0
		var full, rest []span
		for _, s := range without(protectSpans(b, sets[i], align, max(spanMaxBytes, align)), b, t.lent[i]) {
			if holes != nil && t.tracked[i].Backing == evict.Anonymous && !holes[i].Overlaps(b.run(s.start, s.end)) {
				full = append(full, s)
			} else {
				rest = append(rest, s)
			}
		}
		report := func(r pagetable.Region) error {
			set.Add(b.run(r.Start, r.End))
			return nil
		}
		if err := errors.Join(t.scan(ctx, full, fast, report), t.scan(ctx, rest, args, report)); err != nil {
			return nil, t.untracked("protect written pages of", b, err)
		}
	}
	return rearmed, t.mapped()
}

// mapped makes sure that the tracked blocks are mapped whole. A scan does not report addresses that are not mapped,
// nor those of a process that is gone: they would pass for clean. (Memory mapped anew in their place is not
// registered, which the scan does report.)
func (t *PageTables) mapped() error {
	var ranges []pagetable.Range
	for i, b := range t.blocks {
		if t.tracked[i] != nil {
			ranges = append(ranges, pagetable.Range{Start: b.HVA, End: b.End()})
		}
	}
	mappings, err := t.maps(ranges)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUntracked, err)
	}
	for i, b := range t.blocks {
		if t.tracked[i] == nil {
			continue
		}
		if _, err := evict.Cover(mappings, b.HVA, b.End()); err != nil {
			return fmt.Errorf("block %s: %w: %w", b.Name, ErrUntracked, err)
		}
	}
	return nil
}

func (t *PageTables) untracked(doing string, b Block, err error) error {
	if errors.Is(err, pagetable.ErrNotTracked) {
		return fmt.Errorf("%s block %s: %w: %w", doing, b.Name, ErrUntracked, err)
	}
	return fmt.Errorf("%s block %s: %w", doing, b.Name, err)
}
