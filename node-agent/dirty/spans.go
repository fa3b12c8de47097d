package dirty

import "github.com/vmckpt/vmckpt/image/pageset"

const (
	// spanAlignBytes is what spans are widened to. Protecting part of a transparent huge page splits it, and each
	// system call costs more than walking 2 MiB of clean page tables (measured: 7 µs of processor time against 2.5).
	spanAlignBytes = 2 << 20

	// spanMaxBytes bounds one protecting scan. The kernel keeps KVM from mapping anything of the scanned range until the
	// scan is done (fs/proc/task_mmu.c, do_pagemap_scan: mmu_notifier_invalidate_range_start), and takes up to 40 ns a page
	// that it protects: a running guest then waits 0.3 ms at most.
	spanMaxBytes = 32 << 20
)

// span is a range of addresses, [start, end).
type span struct{ start, end uint64 }

// protectSpans returns the ranges to protect so that every page of set lies in one: widened to multiples of align
// (but never beyond the block), neighbours joined, and none longer than limit. align is a power of two, and limit a
// multiple of it.
//
// The spans cover pages that are not in the set. Protecting those is only sound when the scan that protects also
// reports what it protected, as [PageTables] does.
func protectSpans(b Block, set *pageset.Set, align, limit uint64) []span {
	var spans []span
	for r := range set.Runs() {
		s := span{
			start: max((b.HVA+r.First*pageset.PageBytes)&^(align-1), b.HVA),
			end:   min((b.HVA+r.End()*pageset.PageBytes+align-1)&^(align-1), b.End()),
		}
		if n := len(spans); n > 0 && spans[n-1].end >= s.start {
			spans[n-1].end = s.end
			continue
		}
		spans = append(spans, s)
	}
	return cut(spans, align, limit)
}

// cut splits the spans so that none is longer than limit, at multiples of align.
func cut(spans []span, align, limit uint64) []span {
	var out []span
	for _, s := range spans {
		for s.start < s.end {
			end := min((s.start&^(align-1))+limit, s.end)
			out = append(out, span{s.start, end})
			s.start = end
		}
	}
	return out
}

// spansOf returns the ranges of a set's runs.
func spansOf(b Block, set *pageset.Set) []span {
	var spans []span
	for r := range set.Runs() {
		spans = append(spans, span{b.HVA + r.First*pageset.PageBytes, b.HVA + r.End()*pageset.PageBytes})
	}
	return spans
}

// without returns what is left of ascending spans without the pages of set.
func without(spans []span, b Block, set *pageset.Set) []span {
	holes := spansOf(b, set)
	var out []span
	for _, s := range spans {
		for len(holes) > 0 && holes[0].end <= s.start {
			holes = holes[1:]
		}
		for _, h := range holes {
			if h.start >= s.end {
				break
			}
			if s.start < h.start {
				out = append(out, span{s.start, h.start})
			}
			s.start = min(h.end, s.end)
		}
		if s.start < s.end {
			out = append(out, s)
		}
	}
	return out
}
