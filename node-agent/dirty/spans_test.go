package dirty

import (
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
)

func TestProtectSpans(t *testing.T) {
	const mib = 1 << 20
	block := Block{Name: "ram", HVA: 1<<30 + 4096, Bytes: 9*mib + 4096, HostPageBytes: 4096}
	at := func(offset uint64) uint64 { return 1<<30 + offset }
	page := func(offset uint64) uint64 { return (at(offset) - block.HVA) / 4096 }
	for _, c := range []struct {
		name  string
		runs  []pageset.Run
		limit uint64
		want  []span
	}{
		{"nothing", nil, 32 * mib, nil},
		{"one page, widened", []pageset.Run{{First: page(3 * mib), Count: 1}}, 32 * mib, []span{{at(2 * mib), at(4 * mib)}}},
		{"the first page, not beyond the block", []pageset.Run{{First: 0, Count: 1}}, 32 * mib, []span{{at(4096), at(2 * mib)}}},
		{"the last page, not beyond the block", []pageset.Run{{First: block.Pages() - 1, Count: 1}}, 32 * mib, []span{{at(8 * mib), block.End()}}},
		{"neighbours joined", []pageset.Run{{First: page(2 * mib), Count: 1}, {First: page(5 * mib), Count: 1}}, 32 * mib, []span{{at(2 * mib), at(6 * mib)}}},
		{"two pages of one span", []pageset.Run{{First: page(2 * mib), Count: 1}, {First: page(3 * mib), Count: 1}}, 32 * mib, []span{{at(2 * mib), at(4 * mib)}}},
		{"far apart", []pageset.Run{{First: page(2 * mib), Count: 1}, {First: page(7 * mib), Count: 1}}, 32 * mib,
			[]span{{at(2 * mib), at(4 * mib)}, {at(6 * mib), at(8 * mib)}}},
		{"up to a boundary", []pageset.Run{{First: page(2 * mib), Count: 512}}, 32 * mib, []span{{at(2 * mib), at(4 * mib)}}},
		{"cut", []pageset.Run{{First: 0, Count: block.Pages()}}, 4 * mib,
			[]span{{at(4096), at(4 * mib)}, {at(4 * mib), at(8 * mib)}, {at(8 * mib), block.End()}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			set := pageset.New(block.Pages())
			for _, r := range c.runs {
				set.Add(r)
			}
			if diff := cmp.Diff(c.want, protectSpans(block, set, 2*mib, c.limit), cmp.AllowUnexported(span{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Every page of the set is in a span; spans ascend, do not overlap, stay in the block, and are no longer than allowed.
func TestProtectSpansCover(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		b := Block{HVA: rng.Uint64N(1000)*4096 + 1<<30, Bytes: (1 + rng.Uint64N(5000)) * 4096, HostPageBytes: 4096}
		set := pageset.New(b.Pages())
		for range rng.IntN(20) {
			first := rng.Uint64N(b.Pages())
			set.Add(pageset.Run{First: first, Count: rng.Uint64N(min(b.Pages()-first, 700) + 1)})
		}
		left, last := set.Clone(), b.HVA
		for _, s := range protectSpans(b, set, 2<<20, 8<<20) {
			if s.start < last || s.end <= s.start || s.end > b.End() || s.end-s.start > 8<<20 {
				t.Fatalf("span [%#x,%#x) after %#x in %+v", s.start, s.end, last, b)
			}
			last = s.end
			left.Remove(b.run(s.start, s.end))
		}
		if left.Count() > 0 {
			t.Fatalf("%d pages in no span", left.Count())
		}
	}
}
