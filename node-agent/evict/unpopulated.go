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
	const populated = pagetable.CategoryPresent | pagetable.CategorySwapped
	args := pagetable.ScanArgs{
		Start: m.Start, End: m.End,
		// Neither present nor swapped. A page of shared memory that is present is populated for sure, one that is
		// swapped may be a protection that outlived its page, and must be looked up in the file.
		CategoryInverted: populated, CategoryMask: populated, ReturnMask: populated,
	}
	if m.Backing == SharedMemory {
		args.CategoryInverted, args.CategoryMask = pagetable.CategoryPresent, pagetable.CategoryPresent
	}
	err := pagemap.Scan(args, func(r pagetable.Region) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		run := pageset.Run{First: (r.Start - m.Start) / pageset.PageBytes, Count: (r.End - r.Start) / pageset.PageBytes}
		return m.Holes(run, holes.Add)
	})
	if err != nil {
		return nil, fmt.Errorf("find unpopulated memory: %w", err)
	}
	return holes, nil
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
