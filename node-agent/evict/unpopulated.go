package evict

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// Unpopulated returns the pages of the memory that hold nothing and read as zeros. pagemap is that of the process the
// memory belongs to. It changes nothing in the process: unlike reading the memory, it populates no page.
func (m *Memory) Unpopulated(ctx context.Context, pagemap *pagetable.Pagemap) (*pageset.Set, error) {
	holes := pageset.New(m.Pages())
	if m.Backing == SharedHuge || m.Backing == Other {
		return holes, nil
	}
	// Neither present nor swapped. A page of shared memory that is present is populated for sure, one that is swapped may be
	// a protection that outlived its page, and must be looked up in the file.
	populated := pagetable.CategoryPresent | pagetable.CategorySwapped
	if m.Backing == SharedMemory {
		populated = pagetable.CategoryPresent
	}
	unmapped := func(start, end uint64) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		run := pageset.Run{First: (start - m.Start) / pageset.PageBytes, Count: (end - start) / pageset.PageBytes}
		return m.Holes(run, holes.Add)
	}
	err := scanUnmapped(pagemap, m.Start, m.End, populated, unmapped)
	if errors.Is(err, pagetable.ErrUnsupported) {
		err = readUnmapped(pagemap, m.Start, m.End, populated, unmapped)
	}
	if err != nil {
		return nil, fmt.Errorf("find unpopulated memory: %w", err)
	}
	return holes, nil
}

// scanUnmapped calls visit for the ranges of addresses whose pages have none of the categories.
func scanUnmapped(pagemap *pagetable.Pagemap, start, end uint64, populated pagetable.Categories, visit func(start, end uint64) error) error {
	return pagemap.Scan(pagetable.ScanArgs{
		Start: start, End: end, CategoryInverted: populated, CategoryMask: populated, ReturnMask: populated,
	}, func(r pagetable.Region) error { return visit(r.Start, r.End) })
}

// readUnmapped is scanUnmapped for kernels that have no PAGEMAP_SCAN (before Linux 6.7): it reads the entry of every page, which
// takes twenty times as long.
func readUnmapped(pagemap *pagetable.Pagemap, start, end uint64, populated pagetable.Categories, visit func(start, end uint64) error) error {
	begin, at := start, start // of the range at hand: what lies in it has none of the categories
	flush := func() error {
		if begin == at {
			return nil
		}
		return visit(begin, at)
	}
	err := pagemap.Entries(start, end, func(_ uint64, entries []pagetable.Entry) error {
		for _, e := range entries {
			if e.Present() && populated&pagetable.CategoryPresent != 0 || e.Swapped() && populated&pagetable.CategorySwapped != 0 {
				if err := flush(); err != nil {
					return err
				}
				begin = at + pageset.PageBytes
			}
			at += pageset.PageBytes
		}
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// Holes gives the parts of a run that are unpopulated, for a run of pages that no page table maps (neither present
// nor, in private memory, swapped). For private memory that is the whole run; for shared memory it is what are holes
// in the file.
func (m *Memory) Holes(run pageset.Run, visit func(pageset.Run)) error {
	switch m.Backing {
	case Anonymous:
		visit(run)
		return nil
	case SharedMemory:
		return m.fileHoles(run, visit)
	}
	return nil
}

func (m *Memory) fileHoles(run pageset.Run, visit func(pageset.Run)) error {
	fd := int(m.file.Fd())
	offset := func(page uint64) int64 { return int64(m.fileOffset + page*pageset.PageBytes) }
	page := func(offset int64) uint64 { return (uint64(offset) - m.fileOffset) / pageset.PageBytes }
	for at := run.First; at < run.End(); {
		data := run.End()
		switch next, err := unix.Seek(fd, offset(at), unix.SEEK_DATA); {
		case err == nil:
			data = min(page(next), run.End())
		case errors.Is(err, unix.ENXIO): // no data behind this point; behind the end of the file there is none either
		default:
			return fmt.Errorf("find data in shared memory at offset %#x: %w", offset(at), err)
		}
		if data > at {
			visit(pageset.Run{First: at, Count: data - at})
		}
		if data >= run.End() {
			return nil
		}
		next, err := unix.Seek(fd, offset(data), unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find a hole in shared memory at offset %#x: %w", offset(data), err)
		}
		at = page(next + pageset.PageBytes - 1) // a hole that begins within a page, at the end of the file
	}
	return nil
}
