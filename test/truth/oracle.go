package truth

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Oracle holds the whole memory of a machine as it was in one pause.
type Oracle struct {
	pid    int
	names  []string
	blocks [][]byte
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
	for i, b := range layout {
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
			err = o.readPopulated(mem, b, o.blocks[i])
		case b.Shared:
			err = o.readFile(b, o.blocks[i])
		default: // what is not populated of a private mapping of a file comes from the file
			_, err = io.ReadFull(io.NewSectionReader(mem, int64(b.HVA), int64(b.Bytes)), o.blocks[i])
		}
		if err != nil {
			return fmt.Errorf("read block %s: %w", b.Name, err)
		}
	}
	o.blocks = o.blocks[:len(layout)]
	return nil
}

// readPopulated reads the pages of private memory that are there. The others are zeros.
func (o *Oracle) readPopulated(mem *os.File, b qemu.RAMBlock, into []byte) error {
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
		} else if _, err := io.ReadFull(io.NewSectionReader(mem, int64(b.HVA+page*pageset.PageBytes), int64(len(part))), part); err != nil {
			return err
		}
		page = end
	}
	return nil
}

// readFile reads shared memory from the file under it.
func (o *Oracle) readFile(b qemu.RAMBlock, into []byte) error {
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
		_, err = io.ReadFull(io.NewSectionReader(f, int64(b.Backing.OffsetBytes), int64(len(into))), into)
		return err
	}
	return fmt.Errorf("no file is mapped at %#x", b.HVA)
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
