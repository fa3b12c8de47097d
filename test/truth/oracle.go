package truth

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Oracle holds the whole memory of a machine as it was in one pause.
type Oracle struct {
	pid    int
	names  []string
	blocks [][]byte

	populated, before []*pageset.Set // by block, in the last pause and in the one before it
}

// NewOracle makes one for the QEMU process pid.
func NewOracle(pid int) *Oracle { return &Oracle{pid: pid} }

// Look reads all memory. It is a capture's Held hook: the machine stands still.
//
// It reads without populating anything, or the next checkpoint would meet a machine that the test has changed: of private memory the
// pages that the kernel says are there, of shared memory the file itself.
func (o *Oracle) Look(_ context.Context, layout qemu.Layout) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", o.pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	o.names = o.names[:0]
	o.before, o.populated = o.populated, nil
	for i, b := range layout {
		o.populated = append(o.populated, pageset.New(b.Pages()))
		if i == len(o.blocks) {
			o.blocks = append(o.blocks, nil)
		}
		if uint64(cap(o.blocks[i])) < b.Bytes {
			o.blocks[i] = make([]byte, b.Bytes)
		}
		o.blocks[i] = o.blocks[i][:b.Bytes]
		o.names = append(o.names, b.Name)
		var err error
		switch {
		case b.Backing.Kind == qemu.BackingAnonymous:
			err = o.readPopulated(mem, b, o.blocks[i], o.populated[i])
		case b.Shared:
			err = o.readFile(b, o.blocks[i], o.populated[i])
		default: // what is not populated of a private mapping of a file comes from the file
			o.populated[i].AddAll()
			_, err = io.ReadFull(io.NewSectionReader(mem, int64(b.HVA), int64(b.Bytes)), o.blocks[i])
		}
		if err != nil {
			return fmt.Errorf("read block %s: %w", b.Name, err)
		}
	}
	o.blocks = o.blocks[:len(layout)]
	return nil
}

// Memory returns a block as it was in the last pause, nil where there is none of that name.
func (o *Oracle) Memory(name string) []byte {
	if i := slices.Index(o.names, name); i >= 0 {
		return o.blocks[i]
	}
	return nil
}

// GivenBack returns how many pages that were populated in the pause before the last one were not in the last: the machine gave them
// back to the host.
func (o *Oracle) GivenBack() uint64 {
	var n uint64
	for i := range min(len(o.before), len(o.populated)) {
		gone := o.before[i].Clone()
		gone.Subtract(o.populated[i])
		n += gone.Count()
	}
	return n
}

// readPopulated reads the pages of private memory that are there. The others are zeros.
func (o *Oracle) readPopulated(mem *os.File, b qemu.RAMBlock, into []byte, there *pageset.Set) error {
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", o.pid))
	if err != nil {
		return err
	}
	defer pagemap.Close()
	entries := make([]byte, b.Pages()*8)
	if _, err := io.ReadFull(io.NewSectionReader(pagemap, int64(b.HVA/pageset.PageBytes*8), int64(len(entries))), entries); err != nil {
		return err
	}
	// Present or swapped: bits 63 and 62, Documentation/admin-guide/mm/pagemap.rst.
	populated := func(page uint64) bool { return entries[page*8+7]&0xc0 != 0 }
	for page := uint64(0); page < b.Pages(); {
		end := page + 1
		for end < b.Pages() && populated(end) == populated(page) {
			end++
		}
		part := into[page*pageset.PageBytes : end*pageset.PageBytes]
		if !populated(page) {
			clear(part)
			page = end
			continue
		}
		there.Add(pageset.Run{First: page, Count: end - page})
		if _, err := io.ReadFull(io.NewSectionReader(mem, int64(b.HVA+page*pageset.PageBytes), int64(len(part))), part); err != nil {
			return err
		}
		page = end
	}
	return nil
}

// readFile reads shared memory from the file under it. Its holes are the pages that are not there.
func (o *Oracle) readFile(b qemu.RAMBlock, into []byte, there *pageset.Set) error {
	dir := fmt.Sprintf("/proc/%d/map_files", o.pid)
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		var start, end uint64
		if _, err := fmt.Sscanf(name.Name(), "%x-%x", &start, &end); err != nil || b.HVA < start || b.HVA >= end {
			continue
		}
		f, err := os.Open(dir + "/" + name.Name())
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.ReadFull(io.NewSectionReader(f, int64(b.Backing.OffsetBytes), int64(len(into))), into); err != nil {
			return err
		}
		return addData(f, b, there)
	}
	return fmt.Errorf("no file is mapped at %#x", b.HVA)
}

// addData adds the pages of a block for which the file under it has data.
func addData(f *os.File, b qemu.RAMBlock, there *pageset.Set) error {
	first, end := int64(b.Backing.OffsetBytes), int64(b.Backing.OffsetBytes+b.Bytes)
	for at := first; at < end; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil // none behind this place
		}
		if err != nil {
			return err
		}
		hole, err := f.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		at = min(hole, end)
		there.Add(pageset.Run{First: uint64(data-first) / pageset.PageBytes, Count: uint64(at-data+pageset.PageBytes-1) / pageset.PageBytes})
	}
	return nil
}

// Wrong is a page of an image that is not what it must be.
type Wrong struct {
	Block string
	Page  uint64
	What  string
}

func (w Wrong) String() string {
	return fmt.Sprintf("page %#x of block %s: %s", w.Page, w.Block, w.What)
}

// Compare restores the image to bytes and returns every page that differs from what was seen in the pause, that came twice, or that did
// not come at all.
func (o *Oracle) Compare(ctx context.Context, img *image.Image) ([]Wrong, error) {
	manifest := img.Manifest()
	if len(manifest.Blocks) != len(o.blocks) {
		return nil, fmt.Errorf("the image has %d blocks, the machine %d", len(manifest.Blocks), len(o.blocks))
	}
	seen := make([]*pageset.Set, len(o.blocks))
	for i, b := range manifest.Blocks {
		if b.Name != o.names[i] || b.Bytes != uint64(len(o.blocks[i])) {
			return nil, fmt.Errorf("block %d of the image is %v, of the machine %s with %d bytes", i, b, o.names[i], len(o.blocks[i]))
		}
		seen[i] = pageset.New(b.Bytes / pageset.PageBytes)
	}
	var mu sync.Mutex
	var wrong []Wrong
	complain := func(block int, page uint64, format string, args ...any) {
		wrong = append(wrong, Wrong{o.names[block], page, fmt.Sprintf(format, args...)})
	}
	var looked atomic.Uint64
	err := img.Load(ctx, image.LoadOptions{}, func(s image.Span) error {
		var uniform []byte
		if s.Kind != image.Stored {
			uniform = make([]byte, pageset.PageBytes)
			if s.Kind == image.Uniform {
				for at := 0; at < len(uniform); at += 8 {
					binary.LittleEndian.PutUint64(uniform[at:], s.Word)
				}
			}
		}
		var bad []uint64
		for i := range s.Run.Count {
			page := s.Run.First + i
			want := o.blocks[s.Block][page*pageset.PageBytes:][:pageset.PageBytes]
			got := uniform
			if got == nil {
				got = s.Data[i*pageset.PageBytes:][:pageset.PageBytes]
			}
			if !bytes.Equal(got, want) {
				bad = append(bad, page)
			}
		}
		looked.Add(s.Run.Count)
		mu.Lock()
		defer mu.Unlock()
		for _, page := range bad {
			complain(s.Block, page, "differs (%v in the image)", s.Kind)
		}
		for page := s.Run.First; page < s.Run.End(); page++ {
			if seen[s.Block].Has(page) {
				complain(s.Block, page, "came twice")
			}
		}
		seen[s.Block].Add(s.Run)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, set := range seen {
		missing := pageset.New(set.Len())
		missing.AddAll()
		missing.Subtract(set)
		for run := range missing.Runs() {
			for page := run.First; page < run.End(); page++ {
				complain(i, page, "did not come")
			}
		}
	}
	return wrong, nil
}
