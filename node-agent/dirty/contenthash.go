package dirty

import (
	"context"
	"fmt"

	"github.com/vmckpt/vmckpt/node-agent/evict"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// ContentHash calls every page dirty, each time: the image's writer then finds by the parent's page hashes what
// changed. It covers the blocks that nothing tracks.
type ContentHash struct {
	blocks  []Block
	covered []*evict.Memory // nil for blocks that another source tracks
	pagemap *pagetable.Pagemap
}

// Name is "content hash".
func (c *ContentHash) Name() string { return "content hash" }

// Complete says whether the block is covered.
func (c *ContentHash) Complete(block int) bool { return c.covered[block] != nil }

// Arm does nothing: there is nothing to arm.
func (c *ContentHash) Arm(context.Context) error { return nil }

// Estimate counts all pages of the covered blocks.
func (c *ContentHash) Estimate(context.Context) (uint64, error) { return c.all().Count(), nil }

// HarvestLive reports nothing: a page read while the guest runs would have to be read again.
func (c *ContentHash) HarvestLive(context.Context) (Sets, error) {
	return make(Sets, len(c.blocks)), nil
}

// HarvestStanding reports all pages of the covered blocks, and which are unpopulated.
func (c *ContentHash) HarvestStanding(ctx context.Context, still Standstill) (*Standing, error) {
	if err := still.Err(); err != nil {
		return nil, fmt.Errorf("harvest for the content hash: %w", err)
	}
	found := &Standing{
		Written: c.all(), Holes: make(Sets, len(c.blocks)),
		rearm: func(context.Context) (Sets, error) { return make(Sets, len(c.blocks)), nil },
	}
	for i, m := range c.covered {
		if m == nil {
			continue
		}
		holes, err := m.Unpopulated(ctx, c.pagemap)
		if err != nil {
			return nil, fmt.Errorf("block %s: %w", c.blocks[i].Name, err)
		}
		found.Holes[i] = holes
		found.Written[i].Subtract(holes)
	}
	return found, nil
}

func (c *ContentHash) all() Sets {
	all := NewSets(c.blocks)
	for i, m := range c.covered {
		if m == nil {
			all[i] = nil
		}
	}
	all.AddAll()
	return all
}
