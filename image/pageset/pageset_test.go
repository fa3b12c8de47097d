package pageset

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// naive is the set that cannot be wrong.
type naive map[uint64]bool

func (n naive) runs(pages uint64) []Run {
	var runs []Run
	for p := range pages {
		if !n[p] {
			continue
		}
		if l := len(runs); l > 0 && runs[l-1].End() == p {
			runs[l-1].Count++
		} else {
			runs = append(runs, Run{p, 1})
		}
	}
	return runs
}

func TestAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		pages := rng.Uint64N(400)
		s, n := New(pages), naive{}
		for range rng.IntN(20) {
			first := rng.Uint64N(pages + 1)
			r := Run{first, rng.Uint64N(pages - first + 1)}
			add := rng.IntN(3) > 0
			if add {
				s.Add(r)
			} else {
				s.Remove(r)
			}
			for p := r.First; p < r.End(); p++ {
				if add {
					n[p] = true
				} else {
					delete(n, p)
				}
			}
		}
		if diff := cmp.Diff(n.runs(pages), slices.Collect(s.Runs())); diff != "" {
			t.Fatalf("%d pages: runs (-want +got):\n%s", pages, diff)
		}
		if got, want := s.Count(), uint64(len(n)); got != want {
			t.Fatalf("Count = %d, want %d", got, want)
		}
		for p := range pages + 70 {
			if s.Has(p) != n[p] {
				t.Fatalf("Has(%d) = %v", p, s.Has(p))
			}
		}
	}
}

func TestCombine(t *testing.T) {
	a, b := New(130), New(130)
	a.Add(Run{0, 100})
	b.Add(Run{64, 66})
	for _, c := range []struct {
		name string
		op   func(*Set, *Set)
		want []Run
	}{
		{"union", (*Set).Union, []Run{{0, 130}}},
		{"subtract", (*Set).Subtract, []Run{{0, 64}}},
		{"intersect", (*Set).Intersect, []Run{{64, 36}}},
	} {
		s := a.Clone()
		c.op(s, b)
		if diff := cmp.Diff(c.want, slices.Collect(s.Runs())); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestOutsideRangePanics(t *testing.T) {
	for _, r := range []Run{{10, 1}, {9, 2}, {11, 0}, {1, ^uint64(0)}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Add(%v) of a set of 10 pages did not panic", r)
				}
			}()
			New(10).Add(r)
		}()
	}
}

func TestOverlaps(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		s := New(1 + rng.Uint64N(300))
		for range rng.IntN(4) {
			s.Add(Run{rng.Uint64N(s.Len()), 1})
		}
		r := Run{First: rng.Uint64N(s.Len())}
		r.Count = rng.Uint64N(s.Len() - r.First + 1)
		want := false
		for page := r.First; page < r.End(); page++ {
			want = want || s.Has(page)
		}
		if got := s.Overlaps(r); got != want {
			t.Fatalf("%v in a set of %d pages: %v, want %v", r, s.Count(), got, want)
		}
	}
}
