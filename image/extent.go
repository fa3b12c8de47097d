package image

import (
	"fmt"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Kind says where the content of pages is found. The values are part of the format.
type Kind uint8

const (
	Unpopulated Kind = 0 // never had content: zeros
	Evicted     Kind = 1 // had content that nobody needs: comes back as zeros
	Uniform     Kind = 2 // one word of eight bytes, over and over
	Stored      Kind = 3 // in a frame of a data file

	// inherited is only ever in a writer's memory: the parent's entry stays, whatever was submitted before.
	inherited Kind = 4
)

func (k Kind) String() string {
	switch k {
	case Unpopulated:
		return "unpopulated"
	case Evicted:
		return "evicted"
	case Uniform:
		return "uniform"
	case Stored:
		return "stored"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Absence is why pages have no content to save.
type Absence Kind

const (
	AbsentUnpopulated = Absence(Unpopulated)
	AbsentEvicted     = Absence(Evicted)
)

// Extent is what an image says of a run of pages.
type Extent struct {
	Block int // index into the manifest's blocks
	Run   pageset.Run
	Kind  Kind
	Word  uint64 // Uniform: the word, as a little-endian number
}

const (
	framePages    = 16 // pages in a full frame
	frameRawBytes = framePages * pageset.PageBytes
)

// frame is where a frame of pages lies, and all that is needed to read it.
type frame struct {
	file    uint32 // index into a table of data files, whose it is depends on who holds the extent
	pages   uint8  // 1 … framePages
	stored  uint32 // bytes of its payload in the file
	offset  int64  // of the record in the file
	ordinal uint64 // of its first page among all pages in the file: the place of the page's hash
}

func (f frame) end() int64 { return f.offset + recordOverhead + int64(f.stored) }

// extent is an entry of an index, or of what will be one.
type extent struct {
	block uint32
	kind  Kind
	slot  uint8 // Stored: place of the first page in its frame
	first uint64
	count uint64
	seq   uint64 // a writer's: of two entries for one page the one with the greater number holds
	word  uint64 // Uniform
	frame frame  // Stored
}

func (e *extent) end() uint64 { return e.first + e.count }

func (e *extent) public() Extent {
	return Extent{Block: int(e.block), Run: pageset.Run{First: e.first, Count: e.count}, Kind: e.kind, Word: e.word}
}

// cut returns the part of e from page first up to page end.
func (e *extent) cut(first, end uint64) extent {
	part := *e
	if e.kind == Stored {
		part.slot += uint8(first - e.first)
	}
	part.first, part.count = first, end-first
	return part
}

// extend adds next to e if it is the same thing going on, and reports whether it was.
func (e *extent) extend(next *extent) bool {
	if next.block != e.block || next.kind != e.kind || next.seq != e.seq || next.first != e.end() {
		return false
	}
	switch e.kind {
	case Uniform:
		if next.word != e.word {
			return false
		}
	case Stored:
		if next.frame != e.frame || uint64(next.slot) != uint64(e.slot)+e.count {
			return false
		}
	}
	e.count += next.count
	return true
}
