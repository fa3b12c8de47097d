package pageset

import (
	"fmt"
	"iter"
	"math/bits"
)

// PageBytes is the size of a page in every set, whatever the host's page size.
const PageBytes = 4096

// Run is a run of neighbouring pages: First, First+1, … First+Count-1.
type Run struct {
	First uint64 `json:"first"` // page number within its block
	Count uint64 `json:"count"` // pages
}

// End returns the first page number behind the run.
func (r Run) End() uint64 { return r.First + r.Count }

// String gives the run as a half-open interval of page numbers.
func (r Run) String() string { return fmt.Sprintf("[%#x,%#x)", r.First, r.End()) }

// Set is a set of the page numbers 0 … Len()-1 of one memory block. The zero value is a set of no pages at all. A Set is
// not safe for use by several goroutines while one of them changes it.
type Set struct {
	words []uint64
	pages uint64
}

// New returns an empty set over the page numbers below pages.
func New(pages uint64) *Set {
	return &Set{words: make([]uint64, (pages+63)/64), pages: pages}
}

// Len returns how many page numbers the set ranges over, members or not.
func (s *Set) Len() uint64 { return s.pages }

// Count returns how many pages are members.
func (s *Set) Count() uint64 {
	var n uint64
	for _, w := range s.words {
		n += uint64(bits.OnesCount64(w))
	}
	return n
}

// Has reports whether page is a member; pages outside the set's range are not.
func (s *Set) Has(page uint64) bool {
	return page < s.pages && s.words[page/64]&(1<<(page%64)) != 0
}

// Overlaps reports whether any page of the run is a member.
func (s *Set) Overlaps(r Run) bool {
	return r.Count > 0 && s.next(r.First, true) < min(r.End(), s.pages)
}

// Add makes every page of the run a member. It panics where the run leaves the set's range, since a page number outside
// its block is a page attributed to the wrong memory.
func (s *Set) Add(r Run) { s.change(r, func(w *uint64, mask uint64) { *w |= mask }) }

// Remove takes every page of the run out. It panics where the run leaves the set's range.
func (s *Set) Remove(r Run) { s.change(r, func(w *uint64, mask uint64) { *w &^= mask }) }

func (s *Set) change(r Run, f func(w *uint64, mask uint64)) {
	if r.First > s.pages || r.Count > s.pages-r.First {
		panic(fmt.Sprintf("pageset: run %v outside a set of %#x pages", r, s.pages))
	}
	for page := r.First; page < r.End(); {
		from := page % 64
		n := min(64-from, r.End()-page)
		f(&s.words[page/64], ^uint64(0)>>(64-n)<<from)
		page += n
	}
}

// AddAll makes every page number of the range a member.
func (s *Set) AddAll() { s.Add(Run{0, s.pages}) }

// Clear takes every page out.
func (s *Set) Clear() { clear(s.words) }

// Clone returns a copy that shares nothing with s.
func (s *Set) Clone() *Set {
	return &Set{words: append([]uint64(nil), s.words...), pages: s.pages}
}

// Union adds the members of o. Both sets must range over the same number of pages.
func (s *Set) Union(o *Set) {
	for i, w := range s.like(o) {
		s.words[i] |= w
	}
}

// Subtract takes the members of o out. Both sets must range over the same number of pages.
func (s *Set) Subtract(o *Set) {
	for i, w := range s.like(o) {
		s.words[i] &^= w
	}
}

// Intersect keeps only members of o. Both sets must range over the same number of pages.
func (s *Set) Intersect(o *Set) {
	for i, w := range s.like(o) {
		s.words[i] &= w
	}
}

// like returns the words of a set that is to be combined with s.
func (s *Set) like(o *Set) []uint64 {
	if s.pages != o.pages {
		panic(fmt.Sprintf("pageset: sets of %#x and %#x pages combined", s.pages, o.pages))
	}
	return o.words
}

// Runs yields the members as maximal runs, in ascending order. The set must not change meanwhile.
func (s *Set) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for page := s.next(0, true); page < s.pages; {
			end := s.next(page, false)
			if !yield(Run{First: page, Count: end - page}) {
				return
			}
			page = s.next(end, true)
		}
	}
}

// next returns the first page from page on that is (or is not) a member, or Len().
func (s *Set) next(page uint64, member bool) uint64 {
	for page < s.pages {
		w := s.words[page/64]
		if !member {
			w = ^w
		}
		if w >>= page % 64; w != 0 {
			return min(page+uint64(bits.TrailingZeros64(w)), s.pages)
		}
		page = (page/64 + 1) * 64
	}
	return s.pages
}
