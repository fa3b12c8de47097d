package capture

import (
	"context"
	"fmt"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// piece is what one batch takes: runs of one block, image.BatchPages pages at the most.
type piece struct {
	block int
	runs  []pageset.Run
	pages uint64
}

// pieces cuts sets of pages into batches' worth.
func pieces(sets dirty.Sets, yield func(piece) bool) {
	for block, set := range sets {
		if set == nil {
			continue
		}
		p := piece{block: block}
		for run := range set.Runs() {
			for run.Count > 0 {
				n := min(run.Count, image.BatchPages-p.pages)
				p.runs = append(p.runs, pageset.Run{First: run.First, Count: n})
				p.pages += n
				run.First, run.Count = run.First+n, run.Count-n
				if p.pages == image.BatchPages {
					if !yield(p) {
						return
					}
					p = piece{block: block}
				}
			}
		}
		if p.pages > 0 && !yield(p) {
			return
		}
	}
}

// fill reads a piece of guest memory into a batch.
func (c *capture) fill(b *image.Batch, p piece) error {
	b.Block = p.block
	b.Pages = b.Pages[:0]
	hva := c.layout[p.block].HVA
	segments := make([]pagetable.Segment, 0, len(p.runs))
	for _, run := range p.runs {
		for page := run.First; page < run.End(); page++ {
			if omit := c.o.Hooks.Omit; omit != nil && omit(p.block, page) {
				continue
			}
			b.Pages = append(b.Pages, page)
			at := hva + page*pageset.PageBytes
			if n := len(segments); n > 0 && segments[n-1].Address+segments[n-1].Bytes == at {
				segments[n-1].Bytes += pageset.PageBytes
			} else {
				segments = append(segments, pagetable.Segment{Address: at, Bytes: pageset.PageBytes})
			}
		}
	}
	b.Data = b.Data[:len(b.Pages)*pageset.PageBytes]
	if err := c.memory.ReadScatter(b.Data, segments); err != nil {
		return fmt.Errorf("copy pages of block %s: %w", c.layout[p.block].Name, err)
	}
	return nil
}

// copyPages copies sets of pages into the image. give hands out the batch for the next piece, fill fills it, take gets it filled; all are
// called by several goroutines.
func (c *capture) copyPages(ctx context.Context, sets dirty.Sets, give func(context.Context) (*image.Batch, error), take func(*image.Batch), fill func(*image.Batch, piece) error) error {
	group, ctx := errgroup.WithContext(ctx)
	work := make(chan piece, 64)
	group.Go(func() error {
		defer close(work)
		for p := range func(yield func(piece) bool) { pieces(sets, yield) } {
			select {
			case work <- p:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			for p := range work {
				b, err := give(ctx)
				if err != nil {
					return err
				}
				if err := fill(b, p); err != nil {
					c.writer.Release(b)
					return err
				}
				take(b)
				c.report.add(p.pages)
			}
			return nil
		})
	}
	return group.Wait()
}
