package pagetable

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// scanPages returns the page numbers, relative to region's start, that a scan of the region reports.
func (c *child) scanPages(p *Pagemap, region string, args ScanArgs) []uint64 {
	c.t.Helper()
	args.Start, args.End = c.Addresses[region], c.Addresses[region]+regionBytes
	var pages []uint64
	if err := p.Scan(args, func(r Region) error {
		for at := r.Start; at < r.End; at += pageBytes {
			pages = append(pages, (at-args.Start)/pageBytes)
		}
		return nil
	}); err != nil {
		c.t.Fatal(err)
	}
	return pages
}

// writtenSince is a scan for what was written and is now protected again.
func writtenSince() ScanArgs {
	return ScanArgs{WriteProtect: true, CheckAsync: true, CategoryMask: CategoryWritten, ReturnMask: CategoryWritten}
}

// holes is a scan for pages neither present nor swapped.
func holes() ScanArgs {
	const populated = CategoryPresent | CategorySwapped
	return ScanArgs{CategoryMask: populated, CategoryInverted: populated, ReturnMask: CategoryPresent}
}

// TestTracking compares what scans report with what really changed.
func TestTracking(t *testing.T) {
	for _, region := range []string{small, huge, shared} {
		for _, discards := range []bool{false, true} {
			name := region
			if discards {
				name += " with discards"
			}
			t.Run(name, func(t *testing.T) {
				c := startChild(t)
				u, p, m := c.userfaultfd(0), c.pagemap(), c.memory()
				c.do(order{Region: region, Write: pagesOf(0, regionPages, 1)})
				if region == huge {
					wantHuge(t, c)
				}
				start := c.Addresses[region]
				if err := u.Register(start, regionBytes, ModeWriteProtect); err != nil {
					t.Fatal(err)
				}
				c.scanPages(p, region, ScanArgs{WriteProtect: true, CheckAsync: true, CategoryMask: CategoryPresent | CategoryWritten})
				before, after := make([]byte, regionBytes), make([]byte, regionBytes)
				random := rand.New(rand.NewPCG(1, 2))
				for round := range 12 {
					if err := m.Read(before, start); err != nil {
						t.Fatal(err)
					}
					// What reading a hole did to it (the zero page is mapped) belongs to the round before.
					c.scanPages(p, region, writtenSince())
					o := order{Region: region, Write: randomPages(random, random.IntN(regionPages/4))}
					if discards {
						o.Discard = randomPages(random, random.IntN(200))
					}
					c.do(o)
					reported := c.scanPages(p, region, writtenSince())
					empty := c.scanPages(p, region, holes())
					if err := m.Read(after, start); err != nil {
						t.Fatal(err)
					}
					for page := range uint64(regionPages) {
						at := page * pageBytes
						if bytes.Equal(before[at:][:pageBytes], after[at:][:pageBytes]) {
							continue
						}
						_, written := slices.BinarySearch(reported, page)
						_, hole := slices.BinarySearch(empty, page)
						if !written && !hole {
							t.Fatalf("round %d: page %#x changed and was not reported", round, page)
						}
					}
					if !discards {
						if diff := cmp.Diff(o.Write, reported); diff != "" {
							t.Fatalf("round %d: written and reported (-written +reported):\n%.2000s", round, diff)
						}
					}
				}
			})
		}
	}
}

// randomPages returns n different pages in ascending order, in clusters as programs write them.
func randomPages(random *rand.Rand, n int) []uint64 {
	chosen := make(map[uint64]bool, n)
	for len(chosen) < n {
		first := random.Uint64N(regionPages)
		for page := first; page < min(first+1+random.Uint64N(8), regionPages) && len(chosen) < n; page++ {
			chosen[page] = true
		}
	}
	pages := make([]uint64, 0, n)
	for page := range chosen {
		pages = append(pages, page)
	}
	slices.Sort(pages)
	return pages
}

func wantHuge(t *testing.T, c *child) {
	t.Helper()
	for _, m := range c.mappings(Mappings) {
		if m.Start == c.Addresses[huge] {
			if m.AnonHugeBytes == 0 {
				t.Log("no transparent huge pages here: small ones are tested once more")
			}
			return
		}
	}
	t.Fatal("region is not among the mappings")
}

func (c *child) mappings(list func(int) ([]Mapping, error)) []Mapping {
	c.t.Helper()
	mappings, err := list(c.pid)
	if err != nil {
		c.t.Fatal(err)
	}
	return mappings
}

func TestScanOfUntrackedMemory(t *testing.T) {
	c := startChild(t)
	c.userfaultfd(0)
	p := c.pagemap()
	c.do(order{Region: small, Write: []uint64{3}})
	args := writtenSince()
	args.Start, args.End = c.Addresses[small], c.Addresses[small]+regionBytes
	never := func(r Region) error { t.Errorf("region %+v reported", r); return nil }
	if err := p.Scan(args, never); !errors.Is(err, ErrNotTracked) {
		t.Errorf("got %v, want %v", err, ErrNotTracked)
	}
}

// TestScanAcrossMappings scans from one registered region over whatever lies between to another one, in more pieces
// than one call of the kernel returns.
func TestScanAcrossMappings(t *testing.T) {
	c := startChild(t)
	u, p := c.userfaultfd(0), c.pagemap()
	names := []string{small, huge, shared}
	slices.SortFunc(names, func(a, b string) int { return int(int64(c.Addresses[a] - c.Addresses[b])) })
	var want []Region
	for _, name := range names {
		start := c.Addresses[name]
		c.do(order{Region: name, Write: pagesOf(0, regionPages, 1)})
		if err := u.Register(start, regionBytes, ModeWriteProtect); err != nil {
			t.Fatal(err)
		}
		c.scanPages(p, name, writtenSince())
		odd := pagesOf(1, regionPages, 2)
		c.do(order{Region: name, Write: odd})
		for _, page := range odd {
			want = append(want, Region{Start: start + page*pageBytes, End: start + (page+1)*pageBytes, Categories: CategoryWritten})
		}
	}
	if len(want) <= 2*regionsAtOnce {
		t.Fatalf("%d regions do not overflow the buffer", len(want))
	}
	args := writtenSince()
	args.CheckAsync = false // what lies between is not ours
	args.CategoryMask |= CategoryWPAllowed
	args.Start, args.End = c.Addresses[names[0]], c.Addresses[names[len(names)-1]]+regionBytes
	scan := func() []Region {
		var got []Region
		if err := p.Scan(args, func(r Region) error { got = append(got, r); return nil }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if diff := cmp.Diff(want, scan()); diff != "" {
		t.Errorf("regions (-want +got):\n%.2000s", diff)
	}
	if again := scan(); len(again) > 0 {
		t.Errorf("%d regions reported a second time", len(again))
	}
}

func TestScanEndsWithTheVisitor(t *testing.T) {
	c := startChild(t)
	c.do(order{Region: small, Write: pagesOf(0, regionPages, 2)})
	enough := errors.New("enough")
	calls := 0
	err := c.pagemap().Scan(ScanArgs{Start: c.Addresses[small], End: c.Addresses[small] + regionBytes, CategoryMask: CategoryPresent},
		func(Region) error { calls++; return enough })
	if !errors.Is(err, enough) || calls != 1 {
		t.Errorf("%d calls, %v", calls, err)
	}
}

func TestRegistration(t *testing.T) {
	c := startChild(t)
	first, second := c.userfaultfd(0), c.userfaultfd(1)
	start := c.Addresses[small]
	const part = 16 * pageBytes
	for range 2 { // the second time it changes nothing
		if err := first.Register(start, part, ModeWriteProtect); err != nil {
			t.Fatal(err)
		}
	}
	if err := second.Register(start, regionBytes, ModeWriteProtect); !errors.Is(err, ErrOwned) {
		t.Errorf("registered by the other one: got %v, want %v", err, ErrOwned)
	}
	if err := second.Register(start+part, part, ModeWriteProtect); err != nil {
		t.Errorf("a neighbour: %v", err)
	}
	if got := registered(c.mappings(Mappings)); got != 2*part {
		t.Errorf("%d bytes are shown as registered, want %d", got, 2*part)
	}
	if err := first.Unregister(start, part); err != nil {
		t.Error(err)
	}
	if err := second.Unregister(start+part, part); err != nil {
		t.Error(err)
	}
	if got := registered(c.mappings(Mappings)); got != 0 {
		t.Errorf("%d bytes are still shown as registered", got)
	}
	if err := second.Register(start, regionBytes, ModeWriteProtect); err != nil {
		t.Errorf("after the first let go: %v", err)
	}
}

func registered(mappings []Mapping) uint64 {
	var n uint64
	for _, m := range mappings {
		if m.Flags.WriteProtectRegistered() {
			n += m.Bytes()
		}
	}
	return n
}

func TestUnsupportedFeature(t *testing.T) {
	c := startChild(t)
	if _, err := c.rawUserfaultfd(0).API(1 << 63); !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want %v", err, ErrUnsupported)
	}
}

func TestEntries(t *testing.T) {
	c := startChild(t)
	u, p := c.userfaultfd(0), c.pagemap()
	start := c.Addresses[small]
	written := pagesOf(0, regionPages, 3)
	c.do(order{Region: small, Write: written})
	if err := u.Register(start, regionBytes, ModeWriteProtect); err != nil {
		t.Fatal(err)
	}
	const protectedPages = regionPages / 2
	if err := u.WriteProtect(start, protectedPages*pageBytes, true); err != nil {
		t.Fatal(err)
	}
	const liftedPages = 64
	if err := u.WriteProtect(start, liftedPages*pageBytes, false); err != nil {
		t.Fatal(err)
	}
	seen := uint64(0)
	if err := p.Entries(start, start+regionBytes, func(at uint64, entries []Entry) error {
		if at != start+seen*pageBytes {
			t.Fatalf("entries of %#x after those up to %#x", at, start+seen*pageBytes)
		}
		for _, e := range entries {
			present := seen%3 == 0
			protected := seen >= liftedPages && seen < protectedPages
			armedHole := protected && !present
			if e.Present() != present || e.WriteProtected() != protected || e.Swapped() != armedHole || e.FileOrShared() {
				t.Fatalf("page %#x: entry %#x", seen, uint64(e))
			}
			seen++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if seen != regionPages {
		t.Errorf("%d entries of %d", seen, regionPages)
	}
	if err := p.Entries(start+1, start+pageBytes, nil); err == nil {
		t.Error("a range that is not whole pages was taken")
	}
}
