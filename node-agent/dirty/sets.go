package dirty

import "github.com/vmckpt/vmckpt/image/pageset"

// Sets holds one page set for each block of a layout, in the layout's order. Where a source knows nothing of a block,
// its set there is nil; in what [Union] gives out, none is.
type Sets []*pageset.Set

// NewSets returns an empty set for each block.
func NewSets(blocks []Block) Sets {
	s := make(Sets, len(blocks))
	for i, b := range blocks {
		s[i] = pageset.New(b.Pages())
	}
	return s
}

// Count returns the pages in all the sets together.
func (s Sets) Count() uint64 {
	var n uint64
	for _, set := range s {
		if set != nil {
			n += set.Count()
		}
	}
	return n
}

// Clone returns a copy that shares nothing with s.
func (s Sets) Clone() Sets {
	c := make(Sets, len(s))
	for i, set := range s {
		if set != nil {
			c[i] = set.Clone()
		}
	}
	return c
}

// Union adds the members of o; a nil set has none.
func (s Sets) Union(o Sets) { s.combine(o, (*pageset.Set).Union) }

// Subtract takes the members of o out.
func (s Sets) Subtract(o Sets) { s.combine(o, (*pageset.Set).Subtract) }

// Intersect takes out what o has not.
func (s Sets) Intersect(o Sets) { s.combine(o, (*pageset.Set).Intersect) }

func (s Sets) combine(o Sets, op func(*pageset.Set, *pageset.Set)) {
	if len(s) != len(o) {
		panic("dirty: sets of two layouts combined")
	}
	for i, set := range s {
		if set != nil && o[i] != nil {
			op(set, o[i])
		}
	}
}

// AddAll makes every page a member.
func (s Sets) AddAll() {
	for _, set := range s {
		if set != nil {
			set.AddAll()
		}
	}
}

// Clear takes every page out.
func (s Sets) Clear() {
	for _, set := range s {
		if set != nil {
			set.Clear()
		}
	}
}
