package dirty

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/evict"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// harvest takes a standstill and starts over from it.
func harvest(t *testing.T, s *Session) *Instant {
	t.Helper()
	in, err := s.HarvestStanding(t.Context(), &standing{})
	if err != nil || in.Unknown != nil {
		t.Fatalf("harvest: %v, %v", err, in)
	}
	if _, err := in.Rearm(t.Context()); err != nil {
		t.Fatal(err)
	}
	return in
}

func runs(s *pageset.Set) []pageset.Run { return slices.Collect(s.Runs()) }

func expect(t *testing.T, what string, got *pageset.Set, want ...pageset.Run) {
	t.Helper()
	if diff := cmp.Diff(want, runs(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// The states of a page of private memory, one after the other.
func TestPrivatePages(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64})
	c.op("write", 0, 0, 6)
	c.op("read", 0, 6, 2) // the zero page
	s := c.open(t.TempDir())
	first := harvest(t, s)
	expect(t, "first harvest", first.Written[0], pageset.Run{First: 0, Count: 8})
	expect(t, "holes", first.Holes[0], pageset.Run{First: 8, Count: 56})

	c.op("write", 0, 0, 1)
	c.op("dontneed", 0, 1, 1)
	c.op("dontneed", 0, 2, 1)
	c.op("read", 0, 2, 1)
	c.op("dontneed", 0, 3, 1)
	c.op("write", 0, 3, 1)
	c.op("write", 0, 6, 1)  // over the zero page
	c.op("read", 0, 10, 1)  // into a hole
	c.op("write", 0, 12, 1) // into a hole
	second := harvest(t, s)
	expect(t, "written", second.Written[0], pageset.Run{First: 0, Count: 1}, pageset.Run{First: 2, Count: 2},
		pageset.Run{First: 6, Count: 1}, pageset.Run{First: 10, Count: 1}, pageset.Run{First: 12, Count: 1})
	expect(t, "holes", second.Holes[0], pageset.Run{First: 1, Count: 1}, pageset.Run{First: 8, Count: 2},
		pageset.Run{First: 11, Count: 1}, pageset.Run{First: 13, Count: 51})
	expect(t, "written after re-arming", harvest(t, s).Written[0])
}

// A block of huge pages: the huge zero page, and a huge page that is given back in part and whole.
func TestHugePages(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 4 * 512, Huge: true})
	c.op("write", 0, 0, 1)
	c.op("read", 0, 512, 1)
	s := c.open(t.TempDir())
	in := harvest(t, s)
	if in.Written[0].Count() == 2 {
		t.Skip("this machine has no transparent huge pages to give")
	}
	expect(t, "first harvest", in.Written[0], pageset.Run{First: 0, Count: 1024})

	c.op("write", 0, 3, 1)
	c.op("write", 0, 517, 1)
	in = harvest(t, s)
	expect(t, "written", in.Written[0], pageset.Run{First: 3, Count: 1}, pageset.Run{First: 517, Count: 1})
	expect(t, "holes", in.Holes[0], pageset.Run{First: 1024, Count: 1024})

	c.op("dontneed", 0, 0, 512)
	c.op("dontneed", 0, 600, 10)
	c.op("write", 0, 1024, 1)
	in = harvest(t, s)
	expect(t, "written", in.Written[0], pageset.Run{First: 1024, Count: 512})
	expect(t, "holes", in.Holes[0], pageset.Run{First: 0, Count: 512}, pageset.Run{First: 600, Count: 10}, pageset.Run{First: 1536, Count: 512})

	c.op("write", 0, 7, 1) // a fresh huge page where an armed one was
	in = harvest(t, s)
	expect(t, "written", in.Written[0], pageset.Run{First: 0, Count: 512})
}

// A hole that was armed would show as swapped from then on, and be populated by small pages only.
func TestHolesAreNotArmed(t *testing.T) {
	for _, c := range []struct {
		name string
		area area
	}{
		{"private", area{Name: "ram", Pages: 2048, Huge: true}},
		{"shared", area{Name: "ram", Pages: 2048, Shared: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ch := startChild(t, c.area)
			s := ch.open(t.TempDir())
			harvest(t, s)
			ch.op("write", 0, 0, 1)
			ch.op("dontneed", 0, 0, 1)
			for page := uint64(5); page < 500; page += 7 {
				ch.op("write", 0, page, 1)
			}
			ch.op("dontneed", 0, 40, 60) // so that the protected spans have holes between written pages
			if _, err := s.HarvestLive(t.Context()); err != nil {
				t.Fatal(err)
			}
			harvest(t, s)
			b := ch.blocks[0]
			var armed, huge uint64
			scan := pagetable.ScanArgs{Start: b.HVA, End: b.End(), CategoryAnyOf: pagetable.CategorySwapped | pagetable.CategoryHuge,
				ReturnMask: pagetable.CategorySwapped | pagetable.CategoryHuge}
			count := func(r pagetable.Region) error {
				if r.Categories&pagetable.CategorySwapped != 0 {
					armed += (r.End - r.Start) / 4096
				} else {
					huge += (r.End - r.Start) / 4096
				}
				return nil
			}
			if err := s.pagemap.Scan(scan, count); err != nil {
				t.Fatal(err)
			}
			if c.area.Shared {
				// Pages out of the page table that were protected keep their protection: those written and dropped
				// had none.
				return
			}
			if armed > 0 {
				t.Errorf("%d holes are armed", armed)
			}
			huge = 0
			ch.op("write", 0, 1600, 1)
			if err := s.pagemap.Scan(scan, count); err != nil {
				t.Fatal(err)
			}
			if huge == 0 {
				t.Log("a hole of a tracked block was not populated by a huge page: this machine may have none to give")
			}
		})
	}
}

// Shared memory: the page table can lose a page that the file keeps.
func TestSharedPages(t *testing.T) {
	c := startChild(t, area{Name: "memfd", Pages: 64, Shared: true})
	c.op("write", 0, 0, 10)
	s := c.open(t.TempDir())
	in := harvest(t, s)
	expect(t, "first harvest", in.Written[0], pageset.Run{First: 0, Count: 10})
	expect(t, "holes", in.Holes[0], pageset.Run{First: 10, Count: 54})

	c.op("dontneed", 0, 1, 1) // clean, and out of the page table: the protection stays
	c.op("write", 0, 2, 1)
	c.op("dontneed", 0, 2, 1) // written, and out of the page table: nothing tells that it was, so it is dirty
	c.op("write", 0, 20, 1)
	c.op("read", 0, 30, 1) // fills a hole
	in = harvest(t, s)
	expect(t, "written", in.Written[0], pageset.Run{First: 2, Count: 1}, pageset.Run{First: 20, Count: 1}, pageset.Run{First: 30, Count: 1})
	expect(t, "holes", in.Holes[0], pageset.Run{First: 10, Count: 10}, pageset.Run{First: 21, Count: 9}, pageset.Run{First: 31, Count: 33})

	live, err := s.HarvestLive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "still in no page table", live.Written[0], pageset.Run{First: 2, Count: 1})
	c.op("read", 0, 2, 1) // mapped again, it can be protected
	harvest(t, s)
	expect(t, "after that", harvest(t, s).Written[0])

	c.op("remove", 0, 4, 2)
	c.op("remove", 0, 20, 1)
	c.op("write", 0, 5, 1)
	in = harvest(t, s)
	expect(t, "written after a hole was punched", in.Written[0], pageset.Run{First: 5, Count: 1})
	if !in.Holes[0].Has(4) || !in.Holes[0].Has(20) || in.Holes[0].Has(5) {
		t.Errorf("holes: %v", runs(in.Holes[0]))
	}
}

// Why shared memory that something punches holes into is not tracked: a read that fills the hole takes over the
// protection that was left of the page before. When this fails the kernel has learned better, and [Block.Discards]
// can go.
func TestPunchedHoleLooksClean(t *testing.T) {
	c := startChild(t, area{Name: "memfd", Pages: 64, Shared: true})
	c.op("write", 0, 0, 10)
	s := c.open(t.TempDir())
	harvest(t, s)
	c.op("remove", 0, 3, 1)
	c.op("read", 0, 3, 1)
	in := harvest(t, s)
	if in.Written[0].Has(3) || in.Holes[0].Has(3) {
		t.Errorf("a page that was punched out and filled by reading shows: written %v, hole %v", in.Written[0].Has(3), in.Holes[0].Has(3))
	}

	c.blocks[0].Discards = true
	s.Close()
	s = c.open(t.TempDir())
	if err := s.Untracked()[0]; !errors.Is(err, ErrUntracked) {
		t.Errorf("block with discards: %v, want ErrUntracked", err)
	}
	in = harvest(t, s)
	if all := in.Pages[0].Count() + in.Holes[0].Count(); in.Pages[0].Count() != 64 && all != 64 {
		t.Errorf("%d pages and holes of 64", all)
	}
}

// Memory that cannot be tracked is found out, and all of it dirty each time.
func TestUntrackableBacking(t *testing.T) {
	file := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(file, make([]byte, 16*4096), 0o600); err != nil {
		t.Fatal(err)
	}
	c := startChild(t, area{Name: "ram", Pages: 16, Touch: true}, area{Name: "file", Pages: 16, Shared: true, File: file},
		area{Name: "copy", Pages: 16, File: file, Touch: true})
	dir := t.TempDir()
	s := c.open(dir)
	for i, want := range []bool{false, true, true} {
		if err := s.Untracked()[i]; errors.Is(err, ErrUntracked) != want {
			t.Errorf("%s: %v", c.blocks[i].Name, err)
		}
	}
	if s.Memory()[0].Backing != evict.Anonymous || s.Memory()[1].Backing != evict.Other || s.Memory()[2].Backing != evict.Other {
		t.Errorf("backing: %v, %v, %v", s.Memory()[0].Backing, s.Memory()[1].Backing, s.Memory()[2].Backing)
	}
	harvest(t, s)
	for range 2 {
		in := harvest(t, s)
		expect(t, "ram", in.Written[0])
		expect(t, "file", in.Written[1], pageset.Run{First: 0, Count: 16})
		expect(t, "copy", in.Written[2], pageset.Run{First: 0, Count: 16})
	}
	// Such a block does not keep the others from being tracked by the next session.
	image := sealed(t, s)
	s.Close()
	s = c.open(dir)
	if err := s.Since(image); err != nil {
		t.Error(err)
	}
	if n := harvest(t, s).Pages[0].Count(); n != 0 {
		t.Errorf("%d pages of ram, want none", n)
	}
}

// What QEMU unmaps, or maps anew, is not tracked any more, and nothing of it passes for clean.
func TestRemappedMemory(t *testing.T) {
	for _, op := range []string{"unmap", "remap"} {
		t.Run(op, func(t *testing.T) {
			c := startChild(t, area{Name: "ram", Pages: 64, Touch: true}, area{Name: "other", Pages: 32, Touch: true})
			dir := t.TempDir()
			s := c.open(dir)
			in := harvest(t, s)
			if err := s.Sealed(in, Image{"a", "00"}); err != nil {
				t.Fatal(err)
			}
			c.op(op, 0, 40, 1)
			if n, err := s.Estimate(t.Context()); err != nil || n != 96 {
				t.Errorf("estimate: %d pages, %v; want all 96", n, err)
			}
			for name, look := range map[string]func() (*Harvest, error){
				"live": func() (*Harvest, error) { return s.HarvestLive(t.Context()) },
				"standing": func() (*Harvest, error) {
					in, err := s.HarvestStanding(t.Context(), &standing{})
					return &in.Harvest, err
				},
			} {
				h, err := look()
				if err != nil {
					t.Fatal(err)
				}
				if !errors.Is(h.Unknown, ErrUntracked) || h.Written.Count() != 96 || s.Pending().Count() != 96 {
					t.Errorf("%s: unknown: %v; %d written and %d pending of 96", name, h.Unknown, h.Written.Count(), s.Pending().Count())
				}
			}
			s.Close()
			s, err := Open(t.Context(), c.process(), c.blocks, dir, Options{})
			if op == "unmap" {
				if !errors.Is(err, evict.ErrUnmapped) {
					t.Fatalf("open with a block that is not mapped: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			var unknown *UnknownError
			if err := s.Since(Image{"a", "00"}); !errors.As(err, &unknown) {
				t.Errorf("Since: %v", err)
			}
			harvest(t, s)
			c.op("write", 0, 40, 1)
			expect(t, "written to the new mapping", harvest(t, s).Written[0], pageset.Run{First: 40, Count: 1})
		})
	}
}

// With a valid record, memory mapped anew is found out at Open.
func TestRemappedBetweenSessions(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64, Touch: true})
	dir := t.TempDir()
	s := c.open(dir)
	if err := s.Sealed(harvest(t, s), Image{"a", "00"}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	c.op("remap", 0, 40, 1)
	s = c.open(dir)
	if err := s.Since(Image{"a", "00"}); err == nil {
		t.Error("the session goes on from its image")
	}
	if n := s.Pending().Count(); n != 64 {
		t.Errorf("%d pages pending, want all", n)
	}
}

// A process that is gone has no mappings, and a scan of it finds nothing written: that must not pass for clean.
func TestProcessGone(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64, Touch: true})
	s := c.open(t.TempDir())
	harvest(t, s)
	p := c.process()
	c.kill()
	h, err := s.HarvestLive(t.Context())
	if err != nil || h.Unknown == nil || h.Written.Count() != 64 {
		t.Errorf("harvest of a process that is gone: %v, %+v", err, h)
	}
	if _, err := Open(t.Context(), p, c.blocks, t.TempDir(), Options{}); !errors.Is(err, ErrGone) {
		t.Errorf("open: %v, want ErrGone", err)
	}
}

// Pages in swap are tracked like others.
func TestSwappedPages(t *testing.T) {
	text, err := os.ReadFile("/proc/swaps")
	if err != nil || bytes.Count(text, []byte("\n")) < 2 { // a line of headings, and one for each
		t.Skip("this machine has no swap")
	}
	c := startChild(t, area{Name: "ram", Pages: 64})
	c.op("fill", 0, 0, 32)
	s := c.open(t.TempDir())
	c.op("pageout", 0, 16, 16)
	harvest(t, s)
	c.op("pageout", 0, 0, 4)
	c.op("read", 0, 0, 1)
	c.op("write", 0, 1, 1)
	c.op("read", 0, 16, 1)
	c.op("write", 0, 17, 1)
	in := harvest(t, s)
	expect(t, "written", in.Written[0], pageset.Run{First: 1, Count: 1}, pageset.Run{First: 17, Count: 1})
	expect(t, "holes", in.Holes[0], pageset.Run{First: 32, Count: 32})
}

// Shared huge pages of hugetlbfs are tracked at their own size.
func TestHugetlb(t *testing.T) {
	text, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	if free, err2 := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || err2 != nil || free < 4 {
		t.Skip("four free huge pages of 2 MiB are needed (vm.nr_hugepages)")
	}
	c := startChild(t, area{Name: "ram", Pages: 4 * 512, Shared: true, TLB: true})
	c.op("write", 0, 0, 3*512)
	s := c.open(t.TempDir())
	if s.Memory()[0].Backing != evict.SharedHuge || s.Untracked()[0] != nil {
		t.Fatalf("backing %v, untracked: %v", s.Memory()[0].Backing, s.Untracked()[0])
	}
	harvest(t, s)
	c.op("write", 0, 600, 1)
	in := harvest(t, s)
	// The last page was never touched, and the file does not tell: it stays dirty until it is.
	expect(t, "written", in.Written[0], pageset.Run{First: 512, Count: 512}, pageset.Run{First: 1536, Count: 512})
	expect(t, "holes", in.Holes[0])
	c.op("write", 0, 1536, 1)
	harvest(t, s)
	expect(t, "written after re-arming", harvest(t, s).Written[0])
	c.op("write", 0, 5, 1)
	if _, err := s.HarvestLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	in, err = s.HarvestStanding(t.Context(), &standing{})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "after a live harvest", in.Written[0])
	expect(t, "pages", in.Pages[0], pageset.Run{First: 0, Count: 2048})
}
