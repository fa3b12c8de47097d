package image

import (
	"context"
	"encoding/binary"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Span is a run of pages of one kind, with their content.
type Span struct {
	Block int
	Run   pageset.Run
	Kind  Kind
	Word  uint64 // Uniform: the word, as a little-endian number
	Data  []byte // Stored: the pages, valid until the sink returns
}

// LoadOptions say what to load, and how.
type LoadOptions struct {
	Parallel int                  // goroutines that call the sink; 0: as many as there are processors to use
	Block    func(block int) bool // nil: every block
}

const (
	// spanPages is how much of a block is one piece of work, from multiples of it on: 2 MiB, a huge page. Were it put into memory by
	// two workers at once, both would clear a page for it. A frame that goes beyond the multiple belongs to the piece that it begins in.
	spanPages = 512
	spanBytes = (spanPages + framePages - 1) * pageset.PageBytes
	// loadExtents bounds how many extents are handed to a worker at once.
	loadExtents = 512
)

// Load gives every page of the image to sink, exactly once: in no order, from several goroutines. Pages are authenticated
// before they are passed on, each frame by itself, so that a change in the repository at whatever moment shows as an error
// and never as data. After an error some pages have been passed on and others have not.
//
// It reads the index once, and the frames of neighbouring pages once where one piece of work refers to them; its memory
// is a few MiB for each worker.
func (i *Image) Load(ctx context.Context, options LoadOptions, sink func(Span) error) error {
	if options.Parallel <= 0 {
		options.Parallel = runtime.GOMAXPROCS(0)
	}
	// All files at once, so that who deletes the image meanwhile does not break off the load.
	for n := range i.manifest.Data {
		if _, err := i.dataFile(uint32(n)); err != nil {
			return err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	pieces := make(chan []extent)
	group.Go(func() error {
		defer close(pieces)
		return i.pieces(ctx, options, pieces)
	})
	for range options.Parallel {
		group.Go(func() error {
			w := newLoader(i, sink)
			defer w.close()
			for piece := range pieces {
				if err := w.load(ctx, piece); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// pieces reads the index and cuts it into pieces of work: extents whose stored pages are of one span, or a number of others.
func (i *Image) pieces(ctx context.Context, options LoadOptions, out chan<- []extent) error {
	c := i.index.cursor()
	defer c.reader.close()
	var piece []extent
	const none = ^uint64(0)
	at := none // which span of their block the stored pages of the piece belong to
	flush := func() error {
		if len(piece) == 0 {
			return nil
		}
		select {
		case out <- piece:
			piece, at = nil, none
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	all := c.all()
	for {
		e, ok, err := all()
		if err != nil {
			return err
		}
		if !ok {
			return flush()
		}
		if options.Block != nil && !options.Block(int(e.block)) {
			continue
		}
		span := at
		if e.kind == Stored {
			span = e.first / spanPages
		}
		if len(piece) == loadExtents || at != none && span != at {
			if err := flush(); err != nil {
				return err
			}
		}
		piece, at = append(piece, e), span
	}
}

// loader is one worker of Load.
type loader struct {
	frames *frameReader
	sink   func(Span) error
	span   []byte
	parts  [2]framePart // frames of which more may be wanted, the newer first
}

// framePart is a decompressed frame that is kept.
type framePart struct {
	frame frame
	raw   []byte
}

func newLoader(i *Image, sink func(Span) error) *loader {
	return &loader{frames: newFrameReader(i), sink: sink, span: make([]byte, spanBytes)}
}

func (w *loader) close() { w.frames.close() }

// load passes the extents of a piece on, neighbouring stored ones as one span.
func (w *loader) load(ctx context.Context, piece []extent) error {
	for len(piece) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &piece[0]
		if e.kind != Stored {
			x := e.public()
			if err := w.sink(Span{Block: x.Block, Run: x.Run, Kind: x.Kind, Word: x.Word}); err != nil {
				return err
			}
			piece = piece[1:]
			continue
		}
		run := pageset.Run{First: e.first}
		n := 0
		for ; n < len(piece) && piece[n].kind == Stored && piece[n].block == e.block && piece[n].first == run.End(); n++ {
			at := run.Count * pageset.PageBytes
			if err := w.read(&piece[n], w.span[at:at+piece[n].count*pageset.PageBytes]); err != nil {
				return err
			}
			run.Count += piece[n].count
		}
		if err := w.sink(Span{Block: int(e.block), Run: run, Kind: Stored, Data: w.span[:run.Count*pageset.PageBytes]}); err != nil {
			return err
		}
		piece = piece[n:]
	}
	return nil
}

// read fills dst with the pages of a stored extent.
func (w *loader) read(e *extent, dst []byte) error {
	if e.slot == 0 && e.count == uint64(e.frame.pages) {
		return w.frames.read(e.frame, dst)
	}
	part := &w.parts[0]
	if part.frame != e.frame {
		w.parts[0], w.parts[1] = w.parts[1], w.parts[0]
	}
	if part.frame != e.frame {
		part.frame = frame{}
		if part.raw == nil {
			part.raw = make([]byte, frameRawBytes)
		}
		if err := w.frames.read(e.frame, part.raw[:int(e.frame.pages)*pageset.PageBytes]); err != nil {
			return err
		}
		part.frame = e.frame
	}
	copy(dst, part.raw[int(e.slot)*pageset.PageBytes:])
	return nil
}

// frameReader reads, checks and decompresses frames. Each goroutine has its own.
type frameReader struct {
	reader *recordReader
	file   func(number uint32) (*sealedFile, error)
}

func newFrameReader(i *Image) *frameReader {
	return &frameReader{reader: new(recordReader), file: i.dataFile}
}

func (r *frameReader) close() { r.reader.close() }

// read fills dst, which has the frame's size, with its pages.
func (r *frameReader) read(f frame, dst []byte) error {
	file, err := r.file(f.file)
	if err != nil {
		return err
	}
	h, stored, err := r.reader.read(file, frameRecord, f.offset, f.end()-f.offset)
	if err != nil {
		return err
	}
	if h.items != f.pages || h.first != f.ordinal || int(h.raw) != len(dst) {
		return file.damage(f.offset, "not the frame that the index says")
	}
	if err := r.reader.decompress(h.compression, dst, stored); err != nil {
		return file.damage(f.offset, "%v", err)
	}
	return nil
}

// fillWord fills a page with one word.
func fillWord(page []byte, word uint64) {
	binary.LittleEndian.PutUint64(page, word)
	for n := 8; n < len(page); n *= 2 {
		copy(page[n:], page[:n])
	}
}
