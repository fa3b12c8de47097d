package dirty

import (
	"context"
	"errors"
	"fmt"
)

// Union combines several sources over the same blocks: a page is dirty when any of them says so. What it harvests
// goes into the pending set before anything else is done with it.
type Union struct {
	blocks  []Block
	sources []Source
	pending *Pending

	// beforeRearm is called before each call that re-arms: it makes the session record invalid.
	beforeRearm func(context.Context) error

	// since holds what each source reported since the last rearm of a standstill, by source: the sources are
	// comparable only from one standstill to the next.
	since []Sets

	level    bool // all sources count from the same standstill
	nested   bool // see [Session.Nested]
	distrust bool // see [Session.Distrust]
}

// NewUnion combines the sources. beforeRearm is called before every call that re-arms, and keeps it from happening by
// an error.
func NewUnion(blocks []Block, pending *Pending, beforeRearm func(context.Context) error, sources ...Source) *Union {
	u := &Union{blocks: blocks, sources: sources, pending: pending, beforeRearm: beforeRearm}
	u.forget()
	return u
}

func (u *Union) forget() { u.since = make([]Sets, len(u.sources)) }

// Harvest is what one harvest of all sources found.
type Harvest struct {
	Written Sets // by any source; every page where Unknown is set
	Parts   []Part

	// Unknown is set when a source failed: all pages are pending then. It wraps [ErrUntracked] where tracking is
	// gone; everything else (a cancelled context) means only that this harvest is.
	Unknown error
}

// Part is one source's share in a harvest.
type Part struct {
	Source  string
	Written uint64 // pages in this harvest
	Err     error

	since    Sets
	complete []bool // by block
}

// Minus returns the pages that source a has reported since the last rearm of a standstill and source b has not, in
// the blocks that b sees completely. With a the KVM dirty log and b the page tables, a page in it is a broken
// invariant. It is to be asked before the next harvest of the same [Union].
func (h *Harvest) Minus(a, b string) (Sets, error) {
	var left, right Sets
	var complete []bool
	for _, p := range h.Parts {
		if p.Err != nil && (p.Source == a || p.Source == b) {
			return nil, fmt.Errorf("compare %s with %s: %w", a, b, p.Err)
		}
		if p.Source == a {
			left = p.since
		}
		if p.Source == b {
			right, complete = p.since, p.complete
		}
	}
	if left == nil || right == nil {
		return nil, fmt.Errorf("compare %s with %s: not both are sources", a, b)
	}
	difference := left.Clone()
	difference.Subtract(right)
	for i, set := range difference {
		if !complete[i] {
			set.Clear()
		}
	}
	return difference, nil
}

// Arm begins or goes on with tracking in all sources.
func (u *Union) Arm(ctx context.Context) error {
	for _, s := range u.sources {
		if err := s.Arm(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.Name(), err)
		}
	}
	return nil
}

// Estimate counts the pages that an instant now would have to copy: those that are pending, and the most that a
// source has to report. Pages that are both count twice. Where a source cannot tell, it is all pages.
func (u *Union) Estimate(ctx context.Context) (uint64, error) {
	var all, most uint64
	for _, b := range u.blocks {
		all += b.Pages()
	}
	for _, s := range u.sources {
		n, err := s.Estimate(ctx)
		if errors.Is(err, ErrUntracked) {
			return all, nil
		}
		if err != nil {
			return 0, fmt.Errorf("%s: %w", s.Name(), err)
		}
		most = max(most, n)
	}
	return min(u.pending.Count()+most, all), nil
}

// HarvestLive harvests while the guest runs. The pages are pending when it returns, and may be copied only after a
// standstill with drained I/O has come and gone: a page that was pinned for DMA before this call may be written
// afterwards without showing again.
func (u *Union) HarvestLive(ctx context.Context) (*Harvest, error) {
	if err := u.beforeRearm(ctx); err != nil {
		return nil, fmt.Errorf("harvest: %w", err)
	}
	return u.collect(func(s Source) (Sets, error) { return s.HarvestLive(ctx) }), nil
}

// collect asks every source, and makes all pending that they report. Where one fails everything is pending: it may
// have re-armed pages that it could not report any more.
func (u *Union) collect(ask func(Source) (Sets, error)) *Harvest {
	h := &Harvest{Written: NewSets(u.blocks)}
	for i, s := range u.sources {
		found, err := ask(s)
		part := Part{Source: s.Name(), Err: err}
		if err != nil {
			h.Unknown = errors.Join(h.Unknown, fmt.Errorf("%s: %w", s.Name(), err))
		} else {
			part.Written = found.Count()
			h.Written.Union(found)
			if u.since[i] == nil {
				u.since[i] = NewSets(u.blocks)
			}
			u.since[i].Union(found)
		}
		part.since = u.since[i]
		for b := range u.blocks {
			part.complete = append(part.complete, s.Complete(b))
		}
		h.Parts = append(h.Parts, part)
	}
	for i := range u.blocks {
		if !u.complete(i) {
			h.Written[i].AddAll()
		}
	}
	if h.Unknown != nil {
		h.Written.AddAll()
	}
	u.pending.Add(h.Written)
	return h
}

// complete says whether some source sees all writes to the block.
func (u *Union) complete(block int) bool {
	for _, s := range u.sources {
		if s.Complete(block) {
			return true
		}
	}
	return false
}

// Instant is the truth of one standstill.
type Instant struct {
	Harvest

	// Pages are all that an image of this instant has to hold unless its parent has them the same: what was pending,
	// this harvest included.
	Pages Sets
	// Holes read as zeros at this instant. They are the truth for the whole of every block, whatever the parent has
	// there: a page may be in Pages and in Holes, and is zero then.
	Holes Sets
	// Guarded are those of the pages that a guard protects: they need not be copied in the standstill.
	Guarded Sets
	// Compared is what a witness had to say; nil where there is none.
	Compared *Comparison

	// Doubted says that everything is in Written and Pages because the sources are not trusted: see [Comparison] and [Session.Distrust].
	Doubted bool

	found Sets // as Written, without what is in it because of doubts

	union  *Union
	number uint64
	still  Standstill
	rearm  []func(context.Context) (Sets, error) // by source; nil where there is nothing to be done
}

// HarvestStanding takes the truth of a standstill and changes nothing. The call begins and ends in the standstill, or
// it fails.
func (u *Union) HarvestStanding(ctx context.Context, still Standstill) (*Instant, error) {
	in := &Instant{union: u, still: still, Holes: NewSets(u.blocks), Guarded: NewSets(u.blocks), rearm: make([]func(context.Context) (Sets, error), len(u.sources))}
	told := make([]bool, len(u.blocks)) // some source knows the block's holes
	next := 0
	in.Harvest = *u.collect(func(s Source) (Sets, error) {
		i := next
		next++
		found, err := s.HarvestStanding(ctx, still)
		if err != nil {
			return nil, err
		}
		in.rearm[i] = found.rearm
		for b, holes := range found.Holes {
			switch {
			case holes == nil:
			case told[b]: // two that disagree: a page that one of them calls populated is saved
				in.Holes[b].Intersect(holes)
			default:
				told[b] = true
				in.Holes[b].Union(holes)
			}
		}
		if found.Guarded != nil {
			in.Guarded.Union(found.Guarded)
		}
		return found.Written, nil
	})
	if err := still.Err(); err != nil {
		return nil, fmt.Errorf("harvest in a standstill: %w", err)
	}
	in.found = in.Written
	if in.Compared = u.compare(in); in.Compared.Alarm() || u.distrust {
		in.Doubted, in.found = true, in.Written.Clone()
		in.Written.AddAll()
		u.pending.Add(in.Written)
	}
	in.number, in.Pages = u.pending.freeze()
	return in, nil
}

// ErrBroken says that pages were written in what was taken for a standstill.
var ErrBroken = errors.New("the standstill was broken")

// Rearm starts tracking over from this instant. It belongs into the same standstill, before the guest runs: pages that are
// written from then on belong to the next image. Not calling it is safe, the harvested pages are then reported once more.
//
// When it fails, lost are the pages that may have been written since the harvest and do not show as written any more, for they were
// protected here: they are pending, and whoever has copied them before must copy them again. It is nil where there are none. An error
// that is [ErrBroken], or the standstill's own, costs the instant and no more.
func (in *Instant) Rearm(ctx context.Context) (lost Sets, err error) {
	if err := in.still.Err(); err != nil {
		return nil, fmt.Errorf("re-arm tracking: %w", err)
	}
	if err := in.union.beforeRearm(ctx); err != nil {
		return nil, fmt.Errorf("re-arm tracking: %w", err)
	}
	in.union.level = false
	rearmed := NewSets(in.union.blocks)
	var failed error
	for i, rearm := range in.rearm {
		if rearm == nil {
			continue
		}
		in.rearm[i] = nil
		got, err := rearm(ctx)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", in.union.sources[i].Name(), err))
			continue
		}
		rearmed.Union(got)
	}
	if failed != nil {
		in.union.pending.AddAll()
		rearmed.AddAll()
		return rearmed, fmt.Errorf("re-arm tracking: %w", failed)
	}
	if err := in.still.Err(); err != nil {
		// Written after the instant's pages were taken, and protected here: only the pending set knows of those writes.
		in.union.pending.Add(rearmed)
		return rearmed, fmt.Errorf("re-arm tracking: %w", err)
	}
	// In a true standstill nothing is written between the harvest and here. A page that was all the same is not lost: it is
	// pending for the next image, and keeps the record from becoming valid.
	rearmed.Subtract(in.found)
	in.union.pending.Add(rearmed)
	in.union.forget()
	if n := rearmed.Count(); n > 0 {
		return rearmed, fmt.Errorf("re-arm tracking: %w: %d pages were written, first %s", ErrBroken, n, first(in.union.blocks, rearmed))
	}
	in.union.level = true
	return nil, nil
}

// first names the first page of the sets.
func first(blocks []Block, s Sets) string {
	for i, set := range s {
		for r := range set.Runs() {
			return fmt.Sprintf("page %#x of block %s", r.First, blocks[i].Name)
		}
	}
	return "none"
}
