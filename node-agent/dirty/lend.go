package dirty

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// A range of memory has one userfaultfd. What a guard is to have is lent to it: taken out of tracking, and taken back when the guard is gone.
// Nobody sees what is written there meanwhile, and after, it shows as written until a harvest takes it. So what was lent is dirty at the
// next instant, too, whole.

// Look returns what an instant now would find in the page tables, of the blocks that are tracked. It changes nothing.
func (s *Session) Look(ctx context.Context) (*Standing, error) { return s.pages.look(ctx) }

// Lend takes pages out of tracking, those of blocks that are tracked. The record has to be invalid. After an error, too, [Session.TakeBack] has
// to be called.
func (s *Session) Lend(ctx context.Context, pages Sets) error {
	if s.record.Valid {
		return fmt.Errorf("lend pages of %v: its session record is valid", s.process)
	}
	for i, b := range s.blocks {
		if s.untracked[i] != nil || pages[i] == nil {
			continue
		}
		for _, part := range cut(spansOf(b, pages[i]), releaseStepBytes, max(releaseStepBytes, b.HostPageBytes)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			s.lent[i].Add(b.run(part.start, part.end))
			if err := s.uffd.Unregister(part.start, part.end-part.start); err != nil {
				return fmt.Errorf("lend pages of block %s: %w", b.Name, err)
			}
		}
	}
	return nil
}

// TakeBack puts what was lent under tracking again, once whoever had it has let it go. Where that fails nothing is known of these pages any
// more, and all are pending from now on.
func (s *Session) TakeBack() error {
	var failed []error
	for i, b := range s.blocks {
		if s.lent[i].Count() == 0 {
			continue
		}
		// Whole blocks: what is registered already stays as it is, and mappings that were split grow together.
		if err := s.uffd.Register(b.HVA, b.Bytes, pagetable.ModeWriteProtect); err != nil {
			failed = append(failed, fmt.Errorf("take back the lent pages of block %s: %w", b.Name, err))
			continue
		}
		s.lent[i].Clear()
	}
	if err := errors.Join(failed...); err != nil {
		s.pending.AddAll()
		return err
	}
	return nil
}
