package image

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Of a data file that images go on linking, less and less is used: the space of the rest stays taken as long as one of them
// exists, and each file is one more to open. So an increment may rewrite what it still needs of such files into its own.
// A page that the caller submits is stored then, changed or not. The rest goes the same way at the end, ordered before
// everything that the caller submitted.
const (
	rewriteBelow = 4                // a file is worth it when less than one page in so many is used
	crowdedFiles = maxDataFiles / 2 // from this number on, any file is, the least used first
	rewriteSeq   = 0                // calls of the caller's are numbered from 1
)

// chooseRewrites marks the parent's files that will be rewritten: the least used first, within the budget.
func (p *parent) chooseRewrites(budget int64) {
	byUse := slices.Clone(p.files)
	slices.SortStableFunc(byUse, func(a, b *parentFile) int { return cmp.Compare(a.PagesUsed, b.PagesUsed) })
	files := len(byUse)
	for _, f := range byUse {
		bytes := int64(f.PagesUsed) * pageset.PageBytes
		if f.PagesUsed*rewriteBelow >= f.PagesInFile && files < crowdedFiles || bytes > budget {
			continue
		}
		f.rewrite = true
		budget -= bytes
		files--
	}
}

// places is a set of pages. Of those in files that are being rewritten there are no more than the budget allows. The zero value is
// empty and ready to use, by several goroutines.
type places struct {
	mu sync.Mutex
	of map[place]struct{}
}

func (s *places) add(p place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil {
		s.of = map[place]struct{}{}
	}
	s.of[p] = struct{}{}
}

func (s *places) has(p place) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, in := s.of[p]
	return in
}

// rewrites reports whether any file was chosen.
func (p *parent) rewrites() bool {
	return slices.ContainsFunc(p.files, func(f *parentFile) bool { return f.rewrite })
}

// rewrite submits the pages that the parent has in the chosen files, but for those that the caller submitted.
func (w *Writer) rewrite(ctx context.Context) error {
	if w.parent == nil || !w.parent.rewrites() {
		return nil
	}
	// What is still on its way has not been looked up in the parent.
	if err := w.Flush(ctx); err != nil {
		return err
	}
	c := w.parent.index.cursor()
	defer c.reader.close()
	frames := &frameReader{reader: new(recordReader), file: func(n uint32) (*sealedFile, error) { return w.parent.files[n].pageFile, nil }}
	defer frames.close()
	raw := make([]byte, frameRawBytes)
	var (
		last  frame // in raw
		batch *Batch
	)
	flush := func() {
		if batch != nil {
			w.work <- job{batch: batch, seq: rewriteSeq, rewrite: true}
			batch = nil
		}
	}
	defer flush()
	all := c.all()
	for {
		e, ok, err := all()
		if err != nil {
			return w.parent.damaged(err)
		}
		if !ok {
			return nil
		}
		if e.kind != Stored || !w.parent.files[e.frame.file].rewrite {
			continue
		}
		for n := range e.count {
			page := e.first + n
			if w.parent.submitted.has(place{e.block, page}) {
				continue
			}
			if last != e.frame {
				last = frame{}
				if err := frames.read(e.frame, raw[:int(e.frame.pages)*pageset.PageBytes]); err != nil {
					return w.parent.damaged(err)
				}
				last = e.frame
			}
			if batch != nil && (batch.Block != int(e.block) || len(batch.Pages) == BatchPages) {
				flush()
			}
			if batch == nil {
				if batch, err = w.Batch(ctx); err != nil {
					return err
				}
				batch.Block = int(e.block)
			}
			batch.Pages = append(batch.Pages, page)
			batch.Data = append(batch.Data, raw[(uint64(e.slot)+n)*pageset.PageBytes:][:pageset.PageBytes]...)
		}
	}
}
