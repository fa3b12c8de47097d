package image

import (
	"cmp"
	"fmt"
	"slices"
)

// A source yields extents ordered by block and first page, one a call, then ok false.
type source func() (e extent, ok bool, err error)

func before(a, b *extent) int {
	return cmp.Or(cmp.Compare(a.block, b.block), cmp.Compare(a.first, b.first))
}

// sorted orders the extents in place and yields them.
func sorted(extents []extent) source {
	slices.SortFunc(extents, func(a, b extent) int { return before(&a, &b) })
	return func() (extent, bool, error) {
		if len(extents) == 0 {
			return extent{}, false, nil
		}
		e := extents[0]
		extents = extents[1:]
		return e, true, nil
	}
}

// merged yields the extents of all sources in order. The sources are few: the sorted runs of one writer.
func merged(sources ...source) source {
	var heads []extent
	started := false
	fill := func(i int) error {
		e, ok, err := sources[i]()
		if err != nil {
			return err
		}
		if !ok {
			sources, heads = slices.Delete(sources, i, i+1), slices.Delete(heads, i, i+1)
			return nil
		}
		heads[i] = e
		return nil
	}
	return func() (extent, bool, error) {
		if !started {
			started = true
			sources = slices.Clone(sources)
			heads = make([]extent, len(sources))
			for i := len(sources) - 1; i >= 0; i-- {
				if err := fill(i); err != nil {
					return extent{}, false, err
				}
			}
		}
		if len(heads) == 0 {
			return extent{}, false, nil
		}
		least := 0
		for i := range heads {
			if before(&heads[i], &heads[least]) < 0 {
				least = i
			}
		}
		e := heads[least]
		return e, true, fill(least)
	}
}

// resolved yields, of extents that may overlap, for every page the one with the greatest seq: in order, not overlapping.
//
// It sweeps over the pages, holding the extents that cover the present one in a heap. An extent that lies wholly under a
// later one is dropped when it is met, so the heap holds no more than partly overlap in one place.
func resolved(src source) source {
	var (
		ahead extent // next of src
		have  bool
		begun bool
		block uint32
		page  uint64
		cover seqHeap
	)
	advance := func() (err error) {
		ahead, have, err = src()
		return err
	}
	return func() (extent, bool, error) {
		if !begun {
			begun = true
			if err := advance(); err != nil {
				return extent{}, false, err
			}
		}
		for len(cover) > 0 && cover[0].end() <= page {
			cover.pop()
		}
		if len(cover) == 0 {
			if !have {
				return extent{}, false, nil
			}
			block, page = ahead.block, ahead.first
		}
		for have && ahead.block == block && ahead.first <= page {
			cover.push(ahead)
			if err := advance(); err != nil {
				return extent{}, false, err
			}
		}
		top := cover[0]
		for have && ahead.block == block && ahead.first < top.end() && ahead.seq < top.seq {
			if ahead.end() > top.end() {
				cover.push(ahead)
			}
			if err := advance(); err != nil {
				return extent{}, false, err
			}
		}
		end := top.end()
		if have && ahead.block == block {
			end = min(end, ahead.first)
		}
		part := top.cut(page, end)
		page = end
		return part, true, nil
	}
}

// seqHeap is a heap with the greatest seq at its top.
type seqHeap []extent

func (h *seqHeap) push(e extent) {
	s := append(*h, e)
	for i := len(s) - 1; i > 0; {
		up := (i - 1) / 2
		if s[up].seq >= s[i].seq {
			break
		}
		s[up], s[i] = s[i], s[up]
		i = up
	}
	*h = s
}

func (h *seqHeap) pop() {
	s := *h
	last := len(s) - 1
	s[0] = s[last]
	s = s[:last]
	for i := 0; ; {
		down := 2*i + 1
		if down >= len(s) {
			break
		}
		if down+1 < len(s) && s[down+1].seq > s[down].seq {
			down++
		}
		if s[i].seq >= s[down].seq {
			break
		}
		s[i], s[down] = s[down], s[i]
		i = down
	}
	*h = s
}

// coalesced joins neighbours that are the same thing going on.
func coalesced(src source) source {
	var held extent
	have := false
	return func() (extent, bool, error) {
		for {
			e, ok, err := src()
			if err != nil {
				return extent{}, false, err
			}
			switch {
			case !ok && !have:
				return extent{}, false, nil
			case !ok:
				have = false
				return held, true, nil
			case !have:
				held, have = e, true
			case !held.extend(&e):
				out := held
				held = e
				return out, true, nil
			}
		}
	}
}

// The seq of what overParent yields: whose entry it is.
const (
	parentSeq = 0
	ownSeq    = 1
)

// overParent lays the resolved entries of a writer over its parent's: where a writer's entry says inherited, or where it
// has none, the parent's holds. parent may be nil.
func overParent(own, parent source) source {
	laid := func() (extent, bool, error) {
		for {
			e, ok, err := own()
			if e.kind != inherited || !ok || err != nil {
				e.seq = ownSeq
				return e, ok, err
			}
		}
	}
	if parent == nil {
		return laid
	}
	under := func() (extent, bool, error) {
		e, ok, err := parent()
		e.seq = parentSeq
		return e, ok, err
	}
	return resolved(merged(laid, under))
}

// gapError says that extents in order leave out a page, or go beyond the end of a block.
type gapError struct {
	block uint32
	first uint64 // page number expected next
	count uint64 // pages left out in this block; 0: the extents go too far
}

func (e *gapError) Error() string {
	return fmt.Sprintf("%d pages from page %#x of block %d on are not accounted for", e.count, e.first, e.block)
}

// complete passes src on and fails with a gapError where it leaves out a page of a block, or goes beyond one.
func complete(src source, blocks []BlockInfo) source {
	var block uint32
	var page uint64
	return func() (extent, bool, error) {
		for int(block) < len(blocks) && page == blocks[block].pages() {
			block, page = block+1, 0
		}
		e, ok, err := src()
		if err != nil || !ok && int(block) == len(blocks) {
			return extent{}, false, err
		}
		if int(block) == len(blocks) {
			return extent{}, false, &gapError{block: block, first: page}
		}
		gap := &gapError{block: block, first: page, count: blocks[block].pages() - page}
		switch {
		case !ok || e.block > block:
			return extent{}, false, gap
		case e.block == block && e.first > page:
			gap.count = min(gap.count, e.first-page)
			return extent{}, false, gap
		case e.block < block || e.first < page || e.count > gap.count:
			gap.count = 0
			return extent{}, false, gap
		}
		page = e.end()
		return e, true, nil
	}
}
