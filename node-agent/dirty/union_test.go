package dirty

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// source is one that says what it is told to.
type source struct {
	name     string
	complete []bool
	found    Sets
	holes    Sets
	err      error
	rearms   int
}

func (s *source) Name() string                             { return s.name }
func (s *source) Complete(b int) bool                      { return s.complete[b] }
func (s *source) Arm(context.Context) error                { return s.err }
func (s *source) Estimate(context.Context) (uint64, error) { return s.found.Count(), s.err }
func (s *source) HarvestLive(context.Context) (Sets, error) {
	return s.found, s.err
}
func (s *source) HarvestStanding(context.Context, Standstill) (*Standing, error) {
	if s.err != nil {
		return nil, s.err
	}
	return &Standing{Written: s.found, Holes: s.holes, rearm: func(context.Context) (Sets, error) {
		s.rearms++
		return s.found, nil
	}}, nil
}

func unionOf(sources ...Source) (*Union, *Pending) {
	p := NewPending(twoBlocks)
	return NewUnion(twoBlocks, p, func(context.Context) error { return nil }, sources...), p
}

func TestUnion(t *testing.T) {
	a := &source{name: "a", complete: []bool{true, true}, found: some(0, 1, 2), holes: some(1, 4, 5)}
	b := &source{name: "b", complete: []bool{false, false}, found: Sets{some(0, 2, 3)[0], nil}, holes: Sets{nil, some(1, 5, 6)[1]}}
	u, p := unionOf(a, b)
	if n, err := u.Estimate(t.Context()); n != 2 || err != nil {
		t.Errorf("estimate %d, %v", n, err)
	}
	h, err := u.HarvestLive(t.Context())
	if err != nil || h.Unknown != nil {
		t.Fatal(err, h.Unknown)
	}
	expect(t, "union", h.Written[0], pageset.Run{First: 1, Count: 3})
	expect(t, "pending", p.Pages()[0], pageset.Run{First: 1, Count: 3})

	// What one saw live and the other in the standstill is no difference.
	a.found, b.found = some(0, 3, 7), Sets{some(0, 1, 9)[0], nil}
	in, err := u.HarvestStanding(t.Context(), &standing{})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "pages", in.Pages[0], pageset.Run{First: 1, Count: 3}, pageset.Run{First: 7, Count: 1}, pageset.Run{First: 9, Count: 1})
	expect(t, "holes by both", in.Holes[1], pageset.Run{First: 5, Count: 1})
	d, err := in.Minus("b", "a")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "seen by b alone", d[0], pageset.Run{First: 9, Count: 1})
	if d, err := in.Minus("a", "b"); err != nil || d.Count() != 0 {
		t.Errorf("b sees no block completely, and the difference has %d pages, %v", d.Count(), err)
	}
	if _, err := in.Minus("a", "c"); err == nil {
		t.Error("compared with a source that is none")
	}
	for range 2 {
		if _, err := in.Rearm(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if a.rearms != 1 || b.rearms != 1 {
		t.Errorf("re-armed %d and %d times", a.rearms, b.rearms)
	}
	a.found, b.found = some(0), Sets{some(0, 9)[0], nil}
	in, _ = u.HarvestStanding(t.Context(), &standing{})
	d, _ = in.Minus("b", "a")
	expect(t, "counted from the standstill on", d[0], pageset.Run{First: 9, Count: 1})
}

func TestUnionUnknown(t *testing.T) {
	good := &source{name: "good", complete: []bool{true, true}, found: some(0, 1)}
	bad := &source{name: "bad", complete: []bool{true, true}, found: some(0, 2)}
	witness := &source{name: "witness", complete: []bool{true, false}, found: some(0, 3)}
	for _, c := range []struct {
		name    string
		sources []Source
		err     error
		unknown bool
		want    uint64
	}{
		{"all well", []Source{good, bad}, nil, false, 2},
		{"one lost track", []Source{good, bad}, fmt.Errorf("x: %w", ErrUntracked), true, 80},
		{"one failed", []Source{good, bad}, errors.New("x"), true, 80},
		{"no source sees block b completely", []Source{witness}, nil, false, 1 + 16},
		{"no source", nil, nil, false, 80},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad.err = c.err
			u, p := unionOf(c.sources...)
			h, err := u.HarvestLive(t.Context())
			if err != nil || (h.Unknown != nil) != c.unknown || h.Written.Count() != c.want || p.Count() != c.want {
				t.Errorf("live: %v; unknown %v, %d pages, %d pending", err, h.Unknown, h.Written.Count(), p.Count())
			}
			u, p = unionOf(c.sources...)
			in, err := u.HarvestStanding(t.Context(), &standing{})
			if err != nil || (in.Unknown != nil) != c.unknown || in.Pages.Count() != c.want || p.Count() != c.want {
				t.Errorf("standing: %v; unknown %v, %d pages, %d pending", err, in.Unknown, in.Pages.Count(), p.Count())
			}
			if c.err != nil {
				if _, err := in.Minus("bad", "good"); !errors.Is(err, c.err) {
					t.Errorf("compared with a source that failed: %v", err)
				}
			}
		})
	}
}

// No source is asked to re-arm while the record is valid.
func TestUnionKeepsOrder(t *testing.T) {
	refuse := errors.New("record not written")
	s := &source{name: "s", complete: []bool{true, true}, found: some(0, 1)}
	u := NewUnion(twoBlocks, NewPending(twoBlocks), func(context.Context) error { return refuse }, s)
	if _, err := u.HarvestLive(t.Context()); !errors.Is(err, refuse) {
		t.Errorf("live harvest: %v", err)
	}
	in, err := u.HarvestStanding(t.Context(), &standing{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Rearm(t.Context()); !errors.Is(err, refuse) || s.rearms > 0 {
		t.Errorf("rearm: %v, %d times", err, s.rearms)
	}
}
