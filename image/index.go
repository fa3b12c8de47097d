package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sort"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// An index says of every page of every block, in order, where its content is. It is cut into segments, records of up to
// segmentEntries extents, so that neither writing nor reading one takes more memory than a segment; a directory at the
// end says where each begins, so that a page can be looked up.
const (
	segmentEntries        = 4096
	segmentRawBytes       = 256 << 10 // an entry takes 44 bytes at most
	directoryEntryBytes   = 24
	maxIndexDirectorySize = maxRawBytes
)

// place is a page of a block.
type place struct {
	block uint32
	page  uint64
}

// segment is one entry of an index's directory.
type segment struct {
	offset int64
	length uint32 // of the whole record
	start  place
}

// prediction is what a Stored entry is written relative to: frames of one file mostly follow one another.
type prediction struct {
	offset  int64
	ordinal uint64
}

// segmentCoder writes and reads the entries of one segment after the other.
type segmentCoder struct {
	next []prediction // per data file, forgotten at each segment's start
}

func newSegmentCoder(files int) *segmentCoder { return &segmentCoder{next: make([]prediction, files)} }

func (c *segmentCoder) begin() { clear(c.next) }

func (c *segmentCoder) encode(dst []byte, e *extent) []byte {
	dst = binary.AppendUvarint(dst, e.count<<2|uint64(e.kind))
	switch e.kind {
	case Uniform:
		dst = binary.LittleEndian.AppendUint64(dst, e.word)
	case Stored:
		f := &e.frame
		next := &c.next[f.file]
		dst = binary.AppendUvarint(dst, uint64(f.file))
		dst = binary.AppendVarint(dst, f.offset-next.offset)
		dst = binary.AppendUvarint(dst, uint64(f.stored))
		dst = append(dst, f.pages, e.slot)
		dst = binary.AppendVarint(dst, int64(f.ordinal-next.ordinal))
		*next = prediction{offset: f.end(), ordinal: f.ordinal + uint64(f.pages)}
	}
	return dst
}

var (
	errSegmentShort  = errors.New("index segment ends early")
	errSegmentEntry  = errors.New("impossible entry in an index segment")
	errSegmentBounds = errors.New("index entry outside its block or file")
)

// dataBounds is what an index may refer to in one data file.
type dataBounds struct {
	size  int64
	pages uint64
}

// decode appends the extents of a segment to dst. Every one of them lies within its block and within its data file.
func (c *segmentCoder) decode(raw []byte, blocks []BlockInfo, files []dataBounds, dst []extent) ([]extent, error) {
	c.begin()
	uvarint := func() (uint64, bool) {
		v, n := binary.Uvarint(raw)
		if n <= 0 {
			return 0, false
		}
		raw = raw[n:]
		return v, true
	}
	varint := func() (int64, bool) {
		v, n := binary.Varint(raw)
		if n <= 0 {
			return 0, false
		}
		raw = raw[n:]
		return v, true
	}
	block, ok1 := uvarint()
	page, ok2 := uvarint()
	if !ok1 || !ok2 {
		return dst, errSegmentShort
	}
	if block >= uint64(len(blocks)) || page >= blocks[block].pages() {
		return dst, errSegmentBounds
	}
	for entries := 0; len(raw) > 0; entries++ {
		if entries == segmentEntries {
			return dst, errSegmentEntry
		}
		for block < uint64(len(blocks)) && page == blocks[block].pages() {
			block, page = block+1, 0
		}
		if block == uint64(len(blocks)) {
			return dst, errSegmentBounds
		}
		v, ok := uvarint()
		if !ok {
			return dst, errSegmentShort
		}
		e := extent{block: uint32(block), first: page, count: v >> 2, kind: Kind(v & 3)}
		if e.count == 0 || e.count > blocks[block].pages()-page {
			return dst, errSegmentBounds
		}
		switch e.kind {
		case Uniform:
			if len(raw) < 8 {
				return dst, errSegmentShort
			}
			e.word = binary.LittleEndian.Uint64(raw)
			raw = raw[8:]
		case Stored:
			file, ok1 := uvarint()
			offset, ok2 := varint()
			stored, ok3 := uvarint()
			if !ok1 || !ok2 || !ok3 || len(raw) < 2 {
				return dst, errSegmentShort
			}
			pages, slot := raw[0], raw[1]
			raw = raw[2:]
			ordinal, ok := varint()
			if !ok {
				return dst, errSegmentShort
			}
			if file >= uint64(len(files)) {
				return dst, errSegmentBounds
			}
			next, bounds := &c.next[file], files[file]
			f := frame{file: uint32(file), pages: pages, offset: next.offset + offset, ordinal: next.ordinal + uint64(ordinal)}
			switch {
			case pages == 0 || pages > framePages || stored == 0 || stored > uint64(pages)*pageset.PageBytes,
				uint64(slot)+e.count > uint64(pages) || e.count > framePages:
				return dst, errSegmentEntry
			case f.offset < fileHeaderBytes || f.offset > bounds.size-recordOverhead-int64(stored),
				f.ordinal > bounds.pages || uint64(pages) > bounds.pages-f.ordinal:
				return dst, errSegmentBounds
			}
			f.stored = uint32(stored)
			e.slot, e.frame = slot, f
			*next = prediction{offset: f.end(), ordinal: f.ordinal + uint64(pages)}
		}
		page = e.end()
		dst = append(dst, e)
	}
	return dst, nil
}

// indexWriter writes an index from extents in order. What they are is the caller's to check.
type indexWriter struct {
	out       *recordWriter
	coder     *segmentCoder
	raw       []byte
	entries   int    // in raw
	start     place  // of raw
	total     uint64 // entries before raw
	segments  uint64
	directory []byte
}

func newIndexWriter(out *recordWriter) *indexWriter {
	return &indexWriter{out: out, coder: newSegmentCoder(maxDataFiles)}
}

func (w *indexWriter) add(e *extent) error {
	if w.entries == 0 {
		w.coder.begin()
		w.start = place{e.block, e.first}
		w.raw = binary.AppendUvarint(w.raw[:0], uint64(e.block))
		w.raw = binary.AppendUvarint(w.raw, e.first)
	}
	w.raw = w.coder.encode(w.raw, e)
	if w.entries++; w.entries < segmentEntries {
		return nil
	}
	return w.flush()
}

func (w *indexWriter) flush() error {
	if w.entries == 0 {
		return nil
	}
	at := w.out.offset
	if err := w.out.append(recordHeader{kind: segmentRecord, number: w.segments, first: w.total}, w.raw); err != nil {
		return err
	}
	le := binary.LittleEndian
	w.directory = le.AppendUint64(w.directory, uint64(at))
	w.directory = le.AppendUint32(w.directory, uint32(w.out.offset-at))
	w.directory = le.AppendUint32(w.directory, w.start.block)
	w.directory = le.AppendUint64(w.directory, w.start.page)
	w.segments++
	w.total += uint64(w.entries)
	w.entries = 0
	if len(w.directory) > maxIndexDirectorySize {
		return fmt.Errorf("the index has more than %d segments", maxIndexDirectorySize/directoryEntryBytes)
	}
	return nil
}

// finish writes the directory and returns where it stands.
func (w *indexWriter) finish() (directory int64, err error) {
	if err := w.flush(); err != nil {
		return 0, err
	}
	directory = w.out.offset
	return directory, w.out.append(recordHeader{kind: directoryRecord, first: w.total}, w.directory)
}

func decodeDirectory(raw []byte, blocks []BlockInfo, end int64) ([]segment, error) {
	if len(raw)%directoryEntryBytes != 0 {
		return nil, errors.New("directory of the index of impossible length")
	}
	le := binary.LittleEndian
	segments := make([]segment, 0, len(raw)/directoryEntryBytes)
	at := int64(fileHeaderBytes)
	for ; len(raw) > 0; raw = raw[directoryEntryBytes:] {
		offset, length := le.Uint64(raw), le.Uint32(raw[8:])
		s := segment{offset: at, length: length, start: place{le.Uint32(raw[12:]), le.Uint64(raw[16:])}}
		if offset != uint64(at) || length <= recordOverhead || int64(length) > end-at ||
			uint64(s.start.block) >= uint64(len(blocks)) || s.start.page >= blocks[s.start.block].pages() {
			return nil, errors.New("impossible entry in the directory of the index")
		}
		if n := len(segments); n > 0 && !segments[n-1].start.before(s.start) {
			return nil, errors.New("directory of the index out of order")
		}
		segments = append(segments, s)
		at += int64(length)
	}
	if at != end {
		return nil, errors.New("directory of the index does not account for the whole file")
	}
	return segments, nil
}

func (p place) before(q place) bool {
	return p.block < q.block || p.block == q.block && p.page < q.page
}

// index is an index open for reading. Safe for concurrent use; its cursors are not.
type index struct {
	file     *sealedFile
	blocks   []BlockInfo
	data     []dataBounds
	segments []segment
}

func openIndex(reader *recordReader, file *sealedFile, directory int64, blocks []BlockInfo, data []dataBounds) (*index, error) {
	if directory > math.MaxInt64-recordOverhead {
		return nil, file.damage(-1, "no place for a directory")
	}
	_, raw, err := reader.readRaw(file, directoryRecord, directory, file.size-directory, maxIndexDirectorySize)
	if err != nil {
		return nil, err
	}
	segments, err := decodeDirectory(raw, blocks, directory)
	if err != nil {
		return nil, file.damage(directory, "%v", err)
	}
	return &index{file: file, blocks: blocks, data: data, segments: segments}, nil
}

// cursor reads the segments of an index, holding one at a time.
type cursor struct {
	*index
	reader  *recordReader
	coder   *segmentCoder
	raw     []byte
	extents []extent
	held    int // number of the segment in extents; -1: none
}

func (x *index) cursor() *cursor {
	return &cursor{index: x, reader: new(recordReader), coder: newSegmentCoder(len(x.data)), held: -1}
}

func (c *cursor) load(n int) error {
	if c.held == n {
		return nil
	}
	c.held = -1
	s := c.segments[n]
	h, stored, err := c.reader.read(c.file, segmentRecord, s.offset, int64(s.length))
	if err != nil {
		return err
	}
	if h.raw > segmentRawBytes || h.number != uint64(n) {
		return c.file.damage(s.offset, "not the index segment that belongs here")
	}
	if c.raw == nil {
		c.raw = make([]byte, segmentRawBytes)
	}
	raw := c.raw[:h.raw]
	if err := c.reader.decompress(h.compression, raw, stored); err != nil {
		return c.file.damage(s.offset, "%v", err)
	}
	c.extents, err = c.coder.decode(raw, c.blocks, c.data, c.extents[:0])
	if err != nil {
		return c.file.damage(s.offset, "%v", err)
	}
	if len(c.extents) == 0 || c.extents[0].block != s.start.block || c.extents[0].first != s.start.page {
		return c.file.damage(s.offset, "an index segment that begins elsewhere than its directory says")
	}
	c.held = n
	return nil
}

// all yields every extent of the index, in order, and fails if a page is left out.
func (c *cursor) all() source {
	n, i := -1, 0
	each := func() (extent, bool, error) {
		for n < 0 || i == len(c.extents) {
			if n+1 == len(c.segments) {
				return extent{}, false, nil
			}
			n, i = n+1, 0
			if err := c.load(n); err != nil {
				return extent{}, false, err
			}
		}
		i++
		return c.extents[i-1], true, nil
	}
	checked := complete(each, c.blocks)
	return func() (extent, bool, error) {
		e, ok, err := checked()
		if gap, is := err.(*gapError); is {
			return e, ok, c.file.damage(-1, "%v", gap)
		}
		return e, ok, err
	}
}

// find returns the extent that holds the page, which must lie in its block.
func (c *cursor) find(block uint32, page uint64) (*extent, error) {
	want := place{block, page}
	n := sort.Search(len(c.segments), func(i int) bool { return want.before(c.segments[i].start) }) - 1
	if n < 0 {
		return nil, c.file.damage(-1, "no segment for page %#x of block %d", page, block)
	}
	if err := c.load(n); err != nil {
		return nil, err
	}
	i := sort.Search(len(c.extents), func(i int) bool { return want.before(place{c.extents[i].block, c.extents[i].first}) }) - 1
	if i < 0 || c.extents[i].block != block || page >= c.extents[i].end() {
		return nil, c.file.damage(c.segments[n].offset, "no entry for page %#x of block %d", page, block)
	}
	return &c.extents[i], nil
}
