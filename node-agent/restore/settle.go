package restore

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/evict"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

const (
	// settleRounds is how often memory is compared with the image after the load, and put in again where it differs. The first
	// round finds what the load has changed, the second that it stays put.
	settleRounds = 3

	// smallPages is up to which size a block is compared in full, whatever tracking says of it: a ROM, tables, video memory (16 MiB).
	smallPages = 32 << 20 / pageset.PageBytes
)

// settle makes memory as the image says, after the load. It returns the standstill's last harvest: memory is the image's but for
// what shows as written after it.
func (r *restore) settle(ctx context.Context) (*dirty.Instant, error) {
	if err := r.newLayout(ctx); err != nil {
		return nil, err
	}
	again := r.memory.sets()
	var different dirty.Sets
	for round := range settleRounds {
		instant, err := r.session.HarvestStanding(ctx, r.watch)
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pages, holes := r.suspects(instant, different)
		if round == 0 {
			for i, b := range r.blocks {
				if b.pages <= smallPages {
					pages[i].AddAll()
				}
			}
		}
		if err := r.o.harvested(); err != nil {
			return nil, err
		}
		// Before the comparison: what is written after it shows in the next round, or to the next checkpoint.
		lost, err := instant.Rearm(ctx)
		if err != nil && r.watch.Err() != nil {
			return nil, err
		}
		// What QEMU's main loop wrote between the harvest and here is in neither this harvest nor the next one: looked at now or never.
		// The error itself, that this was no true standstill, only keeps the record from being valid.
		r.addLost(pages, holes, lost)
		if different, err = r.compare(ctx, pages, holes, true); err != nil {
			return nil, err
		}
		if different.Count() == 0 {
			r.result.PutAgain = r.describe(again)
			return instant, nil
		}
		again.Union(different)
	}
	return nil, &DifferenceError{Image: r.manifest.Name, Blocks: r.describe(different)}
}

// newLayout reads the RAM blocks once more: the load has given some of them their length.
func (r *restore) newLayout(ctx context.Context) error {
	layout, err := qemu.ReadLayout(ctx, r.target.Monitor, r.target.Process)
	if err != nil {
		return err
	}
	blocks, differences := match(r.manifest.Blocks, layout)
	for i, b := range blocks {
		before := r.blocks[i]
		if b.resized && len(differences) == 0 {
			differences = append(differences, BlockDifference{Name: b.name, Image: r.manifest.Blocks[i].Bytes, Present: layout[b.layout].Bytes})
		}
		if b.hva != before.hva || b.layout != before.layout {
			return fmt.Errorf("RAM block %q was moved from %#x to %#x by the load", b.name, before.hva, b.hva)
		}
	}
	if len(differences) > 0 {
		return &MismatchError{Image: r.manifest.Name, Blocks: differences}
	}
	return nil
}

// suspects returns the pages that may not be as the image says, by a harvest and by the round before, and the pages known to be zeros.
func (r *restore) suspects(instant *dirty.Instant, different dirty.Sets) (pages, holes dirty.Sets) {
	pages, holes = r.memory.sets(), r.memory.sets()
	for i, b := range r.blocks {
		if b.resized { // the session knows it at its old length
			pages[i].AddAll()
			continue
		}
		holes[i].Union(instant.Holes[b.layout])
		if different != nil && r.session.Untracked()[b.layout] != nil {
			// All of it was compared in the first round. What the main loop writes since cannot be seen.
			pages[i].Union(different[i])
			continue
		}
		pages[i].Union(instant.Written[b.layout])
		if different != nil {
			pages[i].Union(different[i])
		}
		// Memory that was given back, and should hold something.
		lost := holes[i].Clone()
		lost.Intersect(r.nonzero[i])
		pages[i].Union(lost)
	}
	return pages, holes
}

// addLost adds the pages that a re-arming took from sight. Those that were holes are none any more.
func (r *restore) addLost(pages, holes, lost dirty.Sets) {
	if lost == nil {
		return
	}
	for i, b := range r.blocks {
		if !b.resized { // else all of it is compared, and the session knows it at its old length
			pages[i].Union(lost[b.layout])
			holes[i].Subtract(lost[b.layout])
		}
	}
}

// compareAll compares all memory with the image, and fails where a page differs.
func (r *restore) compareAll(ctx context.Context) error {
	pages := r.memory.sets()
	pages.AddAll()
	holes, err := r.holes(ctx)
	if err != nil {
		return err
	}
	different, err := r.compare(ctx, pages, holes, false)
	if err != nil {
		return err
	}
	if different.Count() > 0 {
		return &DifferenceError{Image: r.manifest.Name, Blocks: r.describe(different)}
	}
	return nil
}

func (r *restore) compare(ctx context.Context, pages, holes dirty.Sets, fix bool) (dirty.Sets, error) {
	r.report.phase("comparing", int64(pages.Count()*pageset.PageBytes))
	c := &comparison{memory: r.memory, image: r.image, pages: pages, holes: holes, fix: fix, done: &r.report.done}
	different, err := c.run(ctx, r.o.Parallel)
	r.result.ComparedPages += c.compared.Load()
	return different, err
}

// holes returns the pages that hold nothing and read as zeros, for each block of the image.
func (r *restore) holes(ctx context.Context) (dirty.Sets, error) {
	mappings, err := pagetable.Maps(r.target.Process.PID)
	if err != nil {
		return nil, err
	}
	pagemap, err := pagetable.OpenPagemap(r.target.Process.PID)
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	holes := r.memory.sets()
	for i, b := range r.blocks {
		m, err := evict.Resolve(r.target.Process.PID, mappings, b.hva, b.address(b.pages))
		if errors.Is(err, evict.ErrUnmapped) && b.resized {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("block %s: %w", b.name, err)
		}
		set, err := m.Unpopulated(ctx, pagemap)
		m.Close()
		if err != nil {
			return nil, fmt.Errorf("block %s: %w", b.name, err)
		}
		holes[i].Union(set)
	}
	return holes, nil
}

// describe sums sets up, for people.
func (r *restore) describe(sets dirty.Sets) []BlockPages {
	var all []BlockPages
	for i, set := range sets {
		if set.Count() > 0 {
			all = append(all, describePages(r.blocks[i].name, set))
		}
	}
	return all
}
