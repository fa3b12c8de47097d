package dirty

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Why a live harvest needs a barrier before its pages are copied: a device that was given a page's physical address
// before the harvest writes it afterwards without passing the page tables. The page is in the live harvest, and in
// none that follows.
//
// The child reads a file into its memory past the page cache, which is such a device.
func TestPinnedPagesNeedBarrier(t *testing.T) {
	const pages = 16384
	name := filepath.Join(t.TempDir(), "data")
	data := make([]byte, pages*4096)
	rand.Read(data)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()

	var lost uint64
	for attempt := range 30 {
		c := startChild(t, area{Name: "ram", Pages: pages, Touch: true})
		s := c.open(t.TempDir())
		if err := s.Sealed(harvest(t, s), Image{"base", "0"}); err != nil {
			t.Fatal(err)
		}
		base := c.read()

		if _, err := c.try(command{Op: "direct", Area: 0, Count: pages, File: name}); err != nil {
			t.Skipf("no reads past the page cache here: %v", err)
		}
		time.Sleep(time.Duration(attempt%10) * 2 * time.Millisecond)
		live, err := s.HarvestLive(t.Context())
		if err != nil || live.Unknown != nil {
			t.Fatal(err, live)
		}
		early := c.read() // what a capture without a barrier would have copied

		// The barrier: a standstill with all I/O drained. Afterwards a page of the live harvest is like any other.
		c.do(command{Op: "wait"})
		late := c.read()

		in, err := s.HarvestStanding(t.Context(), &standing{})
		if err != nil || in.Unknown != nil {
			t.Fatal(err, in)
		}
		truth := c.read()
		if d := differing(c.blocks, truth, takeImage(base, late, in)); d.Count() > 0 {
			t.Fatalf("%d pages differ though they were copied after the barrier", d.Count())
		}
		// Without one: the live harvest's pages as they were then, and again those that the standstill reports as
		// written.
		image := takeImage(base, early, &Instant{Pages: live.Written, Holes: NewSets(c.blocks)})
		image = takeImage(image, truth, &Instant{Pages: in.Written, Holes: in.Holes})
		lost += differing(c.blocks, truth, image).Count()
		c.kill()
		if lost > 0 {
			t.Logf("attempt %d: %d pages would have been lost without the barrier", attempt+1, lost)
			return
		}
	}
	t.Skip("no read was in flight across a live harvest: this disk is too fast to show it")
}
