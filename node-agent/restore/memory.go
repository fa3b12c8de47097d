package restore

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

const (
	// chunkPages is how much is read or written in one system call: 1 MiB, the size at which that is fastest.
	chunkPages = 256
	chunkBytes = chunkPages * pageset.PageBytes
)

// memory is the machine's memory, looked at by the image's blocks and pages.
type memory struct {
	blocks  []block
	process *pagetable.Memory
	hook    func(block string, run pageset.Run) error
	buffers sync.Pool // of *buffer
}

// buffer is what one goroutine works with.
type buffer struct {
	got  [chunkBytes]byte // of the process
	want [chunkBytes]byte // made up: words, zeros
}

func newMemory(blocks []block, process *pagetable.Memory, hook func(string, pageset.Run) error) *memory {
	return &memory{blocks: blocks, process: process, hook: hook, buffers: sync.Pool{New: func() any { return new(buffer) }}}
}

// sets returns an empty set for each block.
func (m *memory) sets() dirty.Sets {
	s := make(dirty.Sets, len(m.blocks))
	for i, b := range m.blocks {
		s[i] = pageset.New(b.pages)
	}
	return s
}

// write puts pages into the process. It goes through /proc/PID/mem, which stays with the process that it was opened for: a pid that has become
// another process's is not written to. ROMs may be mapped read-only, and are written all the same.
func (m *memory) write(b block, first uint64, data []byte) error {
	if m.hook != nil {
		if err := m.hook(b.name, pageset.Run{First: first, Count: uint64(len(data)) / pageset.PageBytes}); err != nil {
			return err
		}
	}
	if err := m.process.Write(data, b.address(first)); err != nil {
		return fmt.Errorf("write %d pages of block %s from page %#x on: %w", len(data)/pageset.PageBytes, b.name, first, err)
	}
	return nil
}

func (m *memory) read(b block, first uint64, data []byte) error {
	if err := m.process.Read(data, b.address(first)); err != nil {
		return fmt.Errorf("read %d pages of block %s from page %#x on: %w", len(data)/pageset.PageBytes, b.name, first, err)
	}
	return nil
}

// filler puts an image's memory in.
type filler struct {
	*memory
	holes dirty.Sets // read as zeros before
	done  *atomic.Int64

	stored, uniform, zeroed atomic.Uint64 // bytes

	mu      sync.Mutex
	nonzero dirty.Sets // what is to hold something other than zeros
}

// put puts a span in. It is called from several goroutines.
func (f *filler) put(span image.Span) error {
	b := f.blocks[span.Block]
	if b.resized {
		return nil // put in after the load, when it has its length
	}
	if word, ok := uniformWord(span); ok {
		if word == 0 {
			return f.putZeros(span)
		}
		if err := f.putWords(b, span.Run, word); err != nil {
			return err
		}
	} else {
		if err := f.write(b, span.Run.First, span.Data); err != nil {
			return err
		}
		f.stored.Add(uint64(len(span.Data)))
	}
	f.done.Add(int64(span.Run.Count * pageset.PageBytes))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nonzero[span.Block].Add(span.Run)
	return nil
}

// putWords writes one word over and over.
func (f *filler) putWords(b block, run pageset.Run, word uint64) error {
	buf := f.buffers.Get().(*buffer)
	defer f.buffers.Put(buf)
	fill(buf.want[:min(run.Count, chunkPages)*pageset.PageBytes], word)
	for piece := range chunks(run) {
		if err := f.write(b, piece.First, buf.want[:piece.Count*pageset.PageBytes]); err != nil {
			return err
		}
		f.uniform.Add(piece.Count * pageset.PageBytes)
	}
	return nil
}

// putZeros makes pages read as zeros. Holes stay holes, and what is zero is not written: neither is to take memory that it did not have.
func (f *filler) putZeros(span image.Span) error {
	b := f.blocks[span.Block]
	buf := f.buffers.Get().(*buffer)
	defer f.buffers.Put(buf)
	for piece := range chunks(span.Run) {
		for run := range without(f.holes[span.Block], piece) {
			got := buf.got[:run.Count*pageset.PageBytes]
			if err := f.read(b, run.First, got); err != nil {
				return err
			}
			for rest := range nonzero(got, run) {
				zeros := buf.want[:rest.Count*pageset.PageBytes]
				clear(zeros)
				if err := f.write(b, rest.First, zeros); err != nil {
					return err
				}
				f.zeroed.Add(rest.Count * pageset.PageBytes)
			}
		}
		f.done.Add(int64(piece.Count * pageset.PageBytes))
	}
	return nil
}

// uniformWord is the word that all of the span consists of.
func uniformWord(span image.Span) (uint64, bool) {
	switch span.Kind {
	case image.Stored:
		return 0, false
	case image.Uniform:
		return span.Word, true
	}
	return 0, true // never had content, or lost it: zeros
}

// fill fills whole pages with a word.
func fill(b []byte, word uint64) {
	binary.LittleEndian.PutUint64(b, word)
	for n := 8; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

// comparison compares memory with an image.
type comparison struct {
	*memory
	image *image.Image
	pages dirty.Sets // to be compared
	holes dirty.Sets // known to read as zeros, and not read for that
	fix   bool       // write what the image has where memory differs
	done  *atomic.Int64

	compared atomic.Uint64 // pages

	mu        sync.Mutex
	different dirty.Sets
}

// fewPages is up to which number the pages of a block are read from the image one by one, at some 50 µs each.
const fewPages = 1024

// run compares, and returns the pages that differ, or differed.
func (c *comparison) run(ctx context.Context, parallel int) (dirty.Sets, error) {
	c.different = c.sets()
	whole := make([]bool, len(c.blocks))
	for i, set := range c.pages {
		if whole[i] = set.Count() > fewPages; !whole[i] {
			if err := c.one(ctx, i, set); err != nil {
				return nil, err
			}
		}
	}
	err := c.image.Load(ctx, image.LoadOptions{Parallel: parallel, Block: func(i int) bool { return whole[i] }}, c.span)
	return c.different, err
}

// one compares the pages of a set one by one.
func (c *comparison) one(ctx context.Context, block int, set *pageset.Set) error {
	page := make([]byte, pageset.PageBytes)
	for run := range set.Runs() {
		for p := run.First; p < run.End(); p++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := c.image.ReadPage(block, p, page); err != nil {
				return err
			}
			if err := c.span(image.Span{Block: block, Run: pageset.Run{First: p, Count: 1}, Kind: image.Stored, Data: page}); err != nil {
				return err
			}
		}
	}
	return nil
}

// span compares those pages of a span that are asked for. It is called from several goroutines.
func (c *comparison) span(span image.Span) error {
	buf := c.buffers.Get().(*buffer)
	defer c.buffers.Put(buf)
	word, uniform := uniformWord(span)
	if uniform {
		fill(buf.want[:min(span.Run.Count, chunkPages)*pageset.PageBytes], word)
	}
	for piece := range chunks(span.Run) {
		for run := range within(c.pages[span.Block], piece) {
			want := buf.want[:run.Count*pageset.PageBytes]
			if !uniform {
				want = span.Data[(run.First-span.Run.First)*pageset.PageBytes:][:len(want)]
			}
			if err := c.compare(span.Block, run, want, buf.got[:len(want)], uniform && word == 0); err != nil {
				return err
			}
		}
		c.done.Add(int64(piece.Count * pageset.PageBytes))
	}
	return nil
}

// compare compares a run of pages.
func (c *comparison) compare(index int, run pageset.Run, want, got []byte, zero bool) error {
	b := c.blocks[index]
	c.compared.Add(run.Count)
	holes := c.holes[index]
	if zero {
		// To read a hole fills it. All of the run is, most of the time.
		for rest := range without(holes, run) {
			if err := c.comparePopulated(index, b, rest, want[:rest.Count*pageset.PageBytes], got); err != nil {
				return err
			}
		}
		return nil
	}
	return c.comparePopulated(index, b, run, want, got)
}

func (c *comparison) comparePopulated(index int, b block, run pageset.Run, want, got []byte) error {
	got = got[:len(want)]
	if err := c.read(b, run.First, got); err != nil {
		return err
	}
	if bytes.Equal(got, want) {
		return nil
	}
	for page := range run.Count {
		at := page * pageset.PageBytes
		w := want[at : at+pageset.PageBytes]
		if bytes.Equal(got[at:at+pageset.PageBytes], w) {
			continue
		}
		c.mu.Lock()
		c.different[index].Add(pageset.Run{First: run.First + page, Count: 1})
		c.mu.Unlock()
		if !c.fix {
			continue
		}
		if err := c.write(b, run.First+page, w); err != nil {
			return err
		}
	}
	return nil
}
