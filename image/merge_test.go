package image

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// collect reads a source to its end.
func collect(t *testing.T, src source) []extent {
	t.Helper()
	var all []extent
	for {
		e, ok, err := src()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return all
		}
		all = append(all, e)
	}
}

// randomExtents makes extents that overlap as they like, within blocks of 50 pages, each with a seq of its own.
func randomExtents(rng *rand.Rand, seq *uint64) []extent {
	var extents []extent
	for range rng.IntN(30) {
		*seq++
		e := extent{block: rng.Uint32N(3), first: rng.Uint64N(50), seq: *seq, kind: Kind(rng.IntN(5))}
		e.count = 1 + rng.Uint64N(50-e.first)
		switch e.kind {
		case Uniform:
			e.word = rng.Uint64N(2)
		case Stored:
			e.count = min(e.count, framePages)
			e.slot = uint8(rng.Uint64N(framePages - e.count + 1))
			e.frame = frame{file: ownFile, pages: framePages, stored: 100, offset: int64(64 + *seq*1000), ordinal: *seq * framePages}
		}
		extents = append(extents, e)
	}
	return extents
}

// lay is the merge that cannot be wrong: page by page, the last of all holds.
func lay(extents []extent, pages map[place]extent) {
	for i := range extents {
		e := &extents[i]
		for p := e.first; p < e.end(); p++ {
			at := place{e.block, p}
			if old, there := pages[at]; !there || old.seq < e.seq {
				pages[at] = e.cut(p, p+1)
			}
		}
	}
}

func pagesOf(t *testing.T, extents []extent) map[place]extent {
	t.Helper()
	pages := map[place]extent{}
	var last place
	for i := range extents {
		e := &extents[i]
		for p := e.first; p < e.end(); p++ {
			at := place{e.block, p}
			if len(pages) > 0 && !last.before(at) {
				t.Fatalf("page %v comes after %v", at, last)
			}
			last = at
			pages[at] = e.cut(p, p+1)
		}
	}
	return pages
}

func TestResolvedAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 500 {
		want := map[place]extent{}
		var sources []source
		var seq uint64
		for range 1 + rng.IntN(4) {
			part := randomExtents(rng, &seq)
			lay(part, want)
			src := sorted(part)
			if rng.IntN(2) == 0 {
				src = sorted(collect(t, coalesced(resolved(src)))) // as a run is
			}
			sources = append(sources, src)
		}
		got := pagesOf(t, collect(t, resolved(merged(sources...))))
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(extent{}, frame{}, place{})); diff != "" {
			t.Fatalf("round %d (-want +got):\n%s", round, diff)
		}
	}
}

func TestOverParentAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for round := range 500 {
		var seq uint64
		under := collect(t, resolved(sorted(randomExtents(rng, &seq))))
		own := randomExtents(rng, &seq)
		want := map[place]extent{}
		for i := range under {
			if under[i].kind == inherited {
				under[i].kind = Evicted // a parent has no such entries
			}
			under[i].seq = parentSeq
		}
		lay(under, want)
		mine := map[place]extent{}
		lay(own, mine)
		for at, e := range mine {
			if e.kind != inherited {
				e.seq = ownSeq
				want[at] = e
			}
		}
		merge := overParent(resolved(sorted(own)), sorted(under))
		got := pagesOf(t, collect(t, coalesced(merge)))
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(extent{}, frame{}, place{})); diff != "" {
			t.Fatalf("round %d (-want +got):\n%s", round, diff)
		}
	}
}

// TestResolvedHoldsLittle lays one great extent over many small ones: they must not gather in memory.
func TestResolvedHoldsLittle(t *testing.T) {
	const small = 100_000
	i := uint64(0)
	many := func() (extent, bool, error) {
		i++
		return extent{first: i - 1, count: 1, seq: parentSeq}, i <= small, nil
	}
	over := sorted([]extent{{first: 0, count: small, kind: Evicted, seq: ownSeq}})
	allocated := testing.AllocsPerRun(1, func() {})
	src := resolved(merged(over, many))
	allocated = testing.AllocsPerRun(1, func() {
		for {
			if _, ok, _ := src(); !ok {
				return
			}
		}
	}) - allocated
	if allocated > 100 {
		t.Errorf("%v allocations for extents that are all covered", allocated)
	}
}

func TestCoalesced(t *testing.T) {
	f := frame{pages: 16, stored: 9, offset: 64}
	in := []extent{
		{first: 0, count: 2, kind: Unpopulated},
		{first: 2, count: 3, kind: Unpopulated},
		{first: 5, count: 1, kind: Evicted},
		{first: 6, count: 1, kind: Uniform, word: 1},
		{first: 7, count: 1, kind: Uniform, word: 1},
		{first: 8, count: 1, kind: Uniform, word: 2},
		{first: 9, count: 2, kind: Stored, frame: f, slot: 3},
		{first: 11, count: 1, kind: Stored, frame: f, slot: 5},
		{first: 12, count: 1, kind: Stored, frame: f, slot: 7},
		{first: 20, count: 1, kind: Stored, frame: f, slot: 8}, // not a neighbour
		{block: 1, first: 21, count: 1, kind: Stored, frame: f, slot: 9},
	}
	want := []extent{
		{first: 0, count: 5, kind: Unpopulated},
		{first: 5, count: 1, kind: Evicted},
		{first: 6, count: 2, kind: Uniform, word: 1},
		{first: 8, count: 1, kind: Uniform, word: 2},
		{first: 9, count: 3, kind: Stored, frame: f, slot: 3},
		{first: 12, count: 1, kind: Stored, frame: f, slot: 7},
		{first: 20, count: 1, kind: Stored, frame: f, slot: 8},
		{block: 1, first: 21, count: 1, kind: Stored, frame: f, slot: 9},
	}
	got := collect(t, coalesced(sorted(in)))
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(extent{}, frame{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestComplete(t *testing.T) {
	blocks := []BlockInfo{{"a", 10 * pageset.PageBytes}, {"none", 0}, {"b", 4 * pageset.PageBytes}}
	for _, c := range []struct {
		name string
		in   []extent
		want *gapError
	}{
		{"all", []extent{{first: 0, count: 10}, {block: 2, first: 0, count: 4}}, nil},
		{"nothing", nil, &gapError{0, 0, 10}},
		{"beginning", []extent{{first: 2, count: 8}}, &gapError{0, 0, 2}},
		{"middle", []extent{{first: 0, count: 3}, {first: 5, count: 5}}, &gapError{0, 3, 2}},
		{"end of a block", []extent{{first: 0, count: 9}, {block: 2, first: 0, count: 4}}, &gapError{0, 9, 1}},
		{"last block", []extent{{first: 0, count: 10}}, &gapError{2, 0, 4}},
		{"too long", []extent{{first: 0, count: 11}}, &gapError{0, 0, 0}},
		{"overlap", []extent{{first: 0, count: 5}, {first: 4, count: 6}}, &gapError{0, 5, 0}},
		{"too many", []extent{{first: 0, count: 10}, {block: 2, first: 0, count: 4}, {block: 3, first: 0, count: 1}}, &gapError{3, 0, 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := complete(sorted(c.in), blocks)
			var err error
			for ok := true; ok && err == nil; {
				_, ok, err = src()
			}
			gap := new(gapError)
			if !errors.As(err, &gap) {
				gap = nil
			}
			if diff := cmp.Diff(c.want, gap, cmp.AllowUnexported(gapError{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
