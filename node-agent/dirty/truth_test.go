package dirty

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

var (
	rounds = flag.Int("rounds", 70, "random instants for each kind of memory")
	seed   = flag.Uint64("seed", 0, "of the random instants; 0 takes the time")
)

func kinds() map[string][]area {
	return map[string][]area{
		"private": {
			{Name: "small", Pages: 1031}, {Name: "odd", Pages: 37, Touch: true}, {Name: "huge", Pages: 2048, Huge: true},
		},
		"shared": {
			{Name: "memfd", Pages: 1024, Shared: true}, {Name: "memfd huge", Pages: 2048, Shared: true, Huge: true},
		},
		"mixed": {
			{Name: "ram", Pages: 1536, Huge: true, Touch: true}, {Name: "vram", Pages: 300}, {Name: "shm", Pages: 700, Shared: true, Touch: true},
		},
	}
}

// The memory of every instant, taken together from its parent's and what the session says has to be looked at, is
// what the memory was.
func TestInstantsAgainstTruth(t *testing.T) {
	for name, areas := range kinds() {
		t.Run(name, func(t *testing.T) {
			number := *seed
			if number == 0 {
				number = uint64(time.Now().UnixNano())
			}
			t.Logf("-seed %d", number)
			rng := rand.New(rand.NewPCG(number, 1))
			c := startChild(t, areas...)
			if err := runInstants(c, rng, *rounds, nil); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The comparison fails when one page of one harvest is left out.
func TestTruthFindsOmittedPage(t *testing.T) {
	for name, areas := range kinds() {
		t.Run(name, func(t *testing.T) {
			c := startChild(t, areas...)
			rng := rand.New(rand.NewPCG(7, 7))
			err := runInstants(c, rng, 30, func(s *Session) {
				tables := s.Union.sources[0].(*PageTables)
				tables.pagemap = &omitting{Pagemap: s.pagemap, rng: rng}
			})
			if err == nil || !strings.Contains(err.Error(), "differ") {
				t.Fatalf("a page was left out in each harvest, and the comparison said %v", err)
			}
		})
	}
}

// omitting leaves out the first written page of a scan.
type omitting struct {
	*pagetable.Pagemap
	rng *rand.Rand
}

func (o *omitting) Scan(args pagetable.ScanArgs, visit func(pagetable.Region) error) error {
	left := false
	return o.Pagemap.Scan(args, func(r pagetable.Region) error {
		if !left && r.Categories&written != 0 {
			left = true
			if r.Start += pageset.PageBytes; r.Start == r.End {
				return nil
			}
		}
		return visit(r)
	})
}

// runInstants takes a base and then increments at random moments from a child that scribbles, and compares each with
// the truth. prepare, if there, is called on every session before it is used.
func runInstants(c *child, rng *rand.Rand, rounds int, prepare func(*Session)) error {
	dir := c.t.TempDir()
	var s *Session
	var parent Image
	image := make([][]byte, len(c.blocks))
	for i, b := range c.blocks {
		image[i] = make([]byte, b.Bytes)
		rand.NewChaCha8([32]byte{}).Read(image[i]) // what an image has where nothing was ever stored: anything
	}
	var pages, changed uint64
	for round := range rounds {
		if s == nil {
			s = c.open(dir)
			if prepare != nil {
				prepare(s)
			}
			if parent.Name == "" {
				s.SinceNothing()
			} else if err := s.Since(parent); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
		c.do(command{Op: "start", Seed: rng.Uint64()})
		time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		for range rng.IntN(3) {
			if h, err := s.HarvestLive(c.t.Context()); err != nil || h.Unknown != nil {
				return fmt.Errorf("round %d: live harvest: %v, %v", round, err, h)
			}
			time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
		}
		c.do(command{Op: "stop"})
		still := &standing{}
		in, err := s.HarvestStanding(c.t.Context(), still)
		if err != nil || in.Unknown != nil {
			return fmt.Errorf("round %d: %v, %v", round, err, in)
		}
		if rng.IntN(4) > 0 { // it may be left out
			if _, err := in.Rearm(c.t.Context()); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
		truth := c.read()
		taken := takeImage(image, truth, in)
		if d := differing(c.blocks, truth, taken); d.Count() > 0 {
			return fmt.Errorf("round %d: %d pages differ, first %s", round, d.Count(), first(c.blocks, d))
		}
		if round > 0 {
			pages += in.Pages.Count()
			changed += differing(c.blocks, image, taken).Count()
		}
		if rng.IntN(6) == 0 {
			continue // the attempt is thrown away: what it has harvested stays pending, and the parent remains
		}
		image, parent = taken, Image{Name: fmt.Sprint("image ", round), Digest: "00"}
		if err := s.Sealed(in, parent); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if rng.IntN(3) == 0 { // the next increment is another worker's
			if err := s.Close(); err != nil {
				return err
			}
			s = nil
		}
	}
	c.t.Logf("%d instants: %d pages dirty, %d of them changed", rounds, pages, changed)
	return nil
}
