package dirty

import (
	"testing"

	"github.com/vmckpt/vmckpt/image/pageset"
)

var twoBlocks = []Block{
	{Name: "a", HVA: 1 << 30, Bytes: 64 * 4096, HostPageBytes: 4096},
	{Name: "b", HVA: 1 << 31, Bytes: 16 * 4096, HostPageBytes: 4096},
}

func some(block int, pages ...uint64) Sets {
	s := NewSets(twoBlocks)
	for _, p := range pages {
		s[block].Add(pageset.Run{First: p, Count: 1})
	}
	return s
}

func TestPendingShrinksBySealingOnly(t *testing.T) {
	p := NewPending(twoBlocks)
	p.Add(some(0, 1, 2))
	first, pages := p.freeze()
	expect(t, "first instant", pages[0], pageset.Run{First: 1, Count: 2})

	p.Add(some(0, 2, 3)) // page 2 was written again after the instant
	if p.sealed(first) {
		t.Error("nothing pending though pages were added after the instant")
	}
	expect(t, "after the first image", p.Pages()[0], pageset.Run{First: 2, Count: 2})

	second, _ := p.freeze()
	third, pages := p.freeze() // the second attempt was thrown away
	expect(t, "third instant", pages[0], pageset.Run{First: 2, Count: 2})
	if p.sealed(second); p.Count() != 2 {
		t.Error("an instant that another one followed took pages out")
	}
	if !p.sealed(third) || p.Count() != 0 {
		t.Errorf("%d pages pending after all are sealed", p.Count())
	}
	p.AddAll()
	if p.Count() != 80 {
		t.Errorf("%d pages pending of 80", p.Count())
	}
}
