package dirty

import "sync"

// Pending holds the pages that were harvested and are in no sealed image. Nothing but Sealed makes it smaller.
//
// It has two generations, because writes go on while an image is made: what an instant froze belongs into that
// instant's image; what is added afterwards belongs into a later one, also where it is a page that the instant has
// too.
type Pending struct {
	mu     sync.Mutex
	frozen Sets // in the image of the latest instant, once that is sealed
	later  Sets
	latest uint64 // number of the latest instant
}

// NewPending returns a pending set over the blocks, with nothing in it.
func NewPending(blocks []Block) *Pending {
	return &Pending{frozen: NewSets(blocks), later: NewSets(blocks)}
}

// Add makes the members of s pending.
func (p *Pending) Add(s Sets) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.later.Union(s)
}

// AddAll makes every page pending: nothing is known.
func (p *Pending) AddAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.later.AddAll()
}

// Count returns how many pages are pending.
func (p *Pending) Count() uint64 { return p.Pages().Count() }

// Pages returns a copy of what is pending.
func (p *Pending) Pages() Sets {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.frozen.Clone()
	all.Union(p.later)
	return all
}

// freeze makes all that is pending part of an instant, and returns the instant's number and pages. An earlier instant
// that was not sealed goes into the new one.
func (p *Pending) freeze() (uint64, Sets) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen.Union(p.later)
	p.later.Clear()
	p.latest++
	return p.latest, p.frozen.Clone()
}

// sealed takes out what the instant froze, and says whether nothing is pending now. An instant that is not the latest
// takes nothing out: its pages went into the later one, which may hold them for newer writes.
func (p *Pending) sealed(instant uint64) (none bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if instant == p.latest {
		p.frozen.Clear()
	}
	return p.frozen.Count() == 0 && p.later.Count() == 0
}
