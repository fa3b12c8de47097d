package image

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
)

func TestSegmentCoder(t *testing.T) {
	blocks := []BlockInfo{{"a", 40 * pageset.PageBytes}, {"none", 0}, {"b", 1 << 40}}
	files := []dataBounds{{size: 1 << 40, pages: 1 << 30}, {size: 1000, pages: 20}}
	follow := frame{file: 0, pages: 16, stored: 65536, offset: 1 << 30, ordinal: 4096}
	next := frame{file: 0, pages: 1, stored: 1, offset: follow.end(), ordinal: 4112}
	want := []extent{
		{first: 3, count: 16, kind: Stored, frame: follow},
		{first: 19, count: 1, kind: Stored, frame: next},
		{first: 20, count: 5, kind: Stored, slot: 11, frame: follow}, // back again
		{first: 25, count: 2, kind: Stored, slot: 1, frame: frame{file: 1, pages: 3, stored: 888, offset: 64, ordinal: 17}},
		{first: 27, count: 13, kind: Uniform, word: ^uint64(0)},
		{block: 2, first: 0, count: 1 << 27, kind: Unpopulated},
		{block: 2, first: 1 << 27, count: 1<<28 - 1<<27, kind: Evicted},
	}
	c := newSegmentCoder(len(files))
	c.begin()
	raw := []byte{0, 3} // block, page
	for i := range want {
		raw = c.encode(raw, &want[i])
	}
	got, err := newSegmentCoder(len(files)).decode(raw, blocks, files, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(extent{}, frame{})); diff != "" {
		t.Fatalf("(-want +got):\n%s", diff)
	}
	// One more, and it is outside the last block.
	if _, err := c.decode(append(raw, 1<<2), blocks, files, nil); !errors.Is(err, errSegmentBounds) {
		t.Errorf("an entry behind the end: %v", err)
	}
}

func TestSegmentCoderRefuses(t *testing.T) {
	blocks := []BlockInfo{{"a", 40 * pageset.PageBytes}}
	files := []dataBounds{{size: 1000, pages: 20}}
	const stored = byte(Stored)
	for _, c := range []struct {
		name string
		raw  []byte
		want error
	}{
		{"empty", nil, errSegmentShort},
		{"no page", []byte{0}, errSegmentShort},
		{"no such block", []byte{1, 0}, errSegmentBounds},
		{"begins behind its block", []byte{0, 40}, errSegmentBounds},
		{"no pages", []byte{0, 0, 0}, errSegmentBounds},
		{"too many pages", []byte{0, 0, 41 << 2 & 0xff, 1}, errSegmentBounds},
		{"endless number", []byte{0, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1}, errSegmentShort},
		{"half a word", []byte{0, 0, 1<<2 | byte(Uniform), 1, 2, 3}, errSegmentShort},
		{"half a frame", []byte{0, 0, 1<<2 | stored, 0, 2}, errSegmentShort},
		{"no ordinal", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 1, 0}, errSegmentShort},
		{"good", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 1, 0, 0}, nil},
		{"no such file", []byte{0, 0, 1<<2 | stored, 1, 128, 1, 1, 1, 0, 0}, errSegmentBounds},
		{"in the file's header", []byte{0, 0, 1<<2 | stored, 0, 126, 1, 1, 0, 0}, errSegmentBounds},
		{"before the file", []byte{0, 0, 1<<2 | stored, 0, 1, 1, 1, 0, 0}, errSegmentBounds},
		{"behind the file", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 128, 10, 1, 0, 0}, errSegmentBounds},
		{"empty frame", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 0, 1, 0, 0}, errSegmentEntry},
		{"frame of no pages", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 0, 0, 0}, errSegmentEntry},
		{"frame of 17 pages", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 17, 0, 0}, errSegmentEntry},
		{"slot behind the frame", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 1, 1, 0}, errSegmentEntry},
		{"more pages than the frame", []byte{0, 0, 3<<2 | stored, 0, 128, 1, 1, 2, 0, 0}, errSegmentEntry},
		{"stored larger than raw", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 129, 32, 1, 0, 0}, errSegmentEntry},
		{"ordinal behind the file", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 1, 0, 40}, errSegmentBounds},
		{"ordinal before the file", []byte{0, 0, 1<<2 | stored, 0, 128, 1, 1, 1, 0, 1}, errSegmentBounds},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := newSegmentCoder(1).decode(c.raw, blocks, files, nil); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// writeTestIndex writes an index of extents through a file and opens it.
func writeTestIndex(t *testing.T, r *Repository, blocks []BlockInfo, data []dataBounds, extents []extent) *index {
	t.Helper()
	s, err := newSealer(&r.keys, indexFile, ID{9}, r.keys.aead != nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := newRecordWriter(r.disk, &r.keys, "index", s, r.id, Zstd)
	if err != nil {
		t.Fatal(err)
	}
	w := newIndexWriter(out)
	for i := range extents {
		if err := w.add(&extents[i]); err != nil {
			t.Fatal(err)
		}
	}
	directory, err := w.finish()
	if err != nil {
		t.Fatal(err)
	}
	info, err := out.finish()
	if err != nil {
		t.Fatal(err)
	}
	f, _, err := openRegular(r.root, "index")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	x, err := openIndex(new(recordReader), &sealedFile{sealer: s, name: "index", file: f, size: info.Bytes}, directory, blocks, data)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestIndexOfManySegments writes more entries than fit a segment and finds each of them again.
func TestIndexOfManySegments(t *testing.T) {
	rng := rand.New(rand.NewPCG(8, 9))
	r := newRepository(t, testKeys(true))
	const entries = 3*segmentEntries + 100
	blocks := []BlockInfo{{"small", pageset.PageBytes}, {"large", 0}}
	extents := []extent{{count: 1, kind: Evicted}}
	data := []dataBounds{{1 << 40, 1 << 30}, {1 << 40, 1 << 30}}
	next := make([]prediction, 2)
	page := uint64(0)
	for range entries {
		e := extent{block: 1, first: page, count: 1 + rng.Uint64N(framePages), kind: Kind(rng.IntN(4))}
		switch e.kind {
		case Uniform:
			e.word = rng.Uint64()
		case Stored:
			n := rng.Uint32N(2)
			e.frame = frame{file: n, pages: framePages, stored: 1 + rng.Uint32N(frameRawBytes), offset: 64 + next[n].offset, ordinal: next[n].ordinal}
			next[n] = prediction{e.frame.end(), e.frame.ordinal + framePages}
		}
		page = e.end()
		extents = append(extents, e)
	}
	blocks[1].Bytes = page * pageset.PageBytes
	x := writeTestIndex(t, r, blocks, data, extents)
	if len(x.segments) != 4 {
		t.Errorf("%d segments, want 4", len(x.segments))
	}
	c := x.cursor()
	if diff := cmp.Diff(extents, collect(t, c.all()), cmp.AllowUnexported(extent{}, frame{})); diff != "" {
		t.Fatalf("(-want +got):\n%s", diff)
	}
	for range 2000 {
		e := extents[rng.IntN(len(extents))]
		got, err := c.find(e.block, e.first+rng.Uint64N(e.count))
		if err != nil {
			t.Fatal(err)
		}
		if *got != e {
			t.Fatalf("found %+v, want %+v", *got, e)
		}
	}
}

// TestIndexWithAGap: every page has to be accounted for, whatever the index says of itself.
func TestIndexWithAGap(t *testing.T) {
	r := newRepository(t, testKeys(false))
	blocks := []BlockInfo{{"a", 40 * pageset.PageBytes}}
	x := writeTestIndex(t, r, blocks, nil, []extent{{count: 39, kind: Evicted}})
	c := x.cursor()
	src := c.all()
	var err error
	for ok := true; ok && err == nil; {
		_, ok, err = src()
	}
	if damage := new(DamageError); !errors.As(err, &damage) {
		t.Errorf("all: %v", err)
	}
	if _, err := c.find(0, 39); err == nil {
		t.Error("found a page that is in no entry")
	}
}
