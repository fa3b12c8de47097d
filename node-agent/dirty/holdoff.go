package dirty

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// A guard sees writes. It does not see a page being given back (a balloon, free page reporting: MADV_DONTNEED), after which it is zeros, nor KSM
// merging it, after which it is not protected any more. Both are held off for as long as there is a guard; what comes through all the same is
// found out, and the attempt is lost.

// HeldOff is memory of a process that is kept from being given back or merged behind a guard. What a capture that was killed has left of it
// the next one undoes, or a release.
type HeldOff struct {
	Locked    []pagetable.Range `json:"locked,omitempty"`    // so that it cannot be given back
	NotMerged []pagetable.Range `json:"notMerged,omitempty"` // that may be merged otherwise

	// Of the process before, with Locked: RLIMIT_MEMLOCK, bytes.
	MemlockSoft uint64 `json:"memlockSoft,omitzero"`
	MemlockHard uint64 `json:"memlockHard,omitzero"`
}

const (
	// holdOffBytes is what one call is about: it walks the page tables, and page faults wait for it (2 ms for small pages).
	holdOffBytes = 16 << 20

	// How much is done in one stop of QEMU's main thread.
	stopBytes, stopCalls = 64 << 20, 64
)

// HoldOff keeps pages that are to be guarded from being given back and from being merged, where somebody may do so. After an error, too,
// [Session.LetBe] has to be called.
func (s *Session) HoldOff(ctx context.Context, pages Sets) error {
	// What is left of an earlier attempt is undone first: what holds now is what has to be put back.
	if err := s.LetBe(ctx); err != nil {
		return err
	}
	merging, err := ksmRuns()
	if err != nil {
		return err
	}
	var all []pagetable.Range
	discards := false
	for i, b := range s.blocks {
		for _, part := range spansOf(b, pages[i]) {
			all = append(all, pagetable.Range{Start: part.start, End: part.end})
			discards = discards || b.Discards
		}
	}
	if !discards && !merging {
		return nil
	}
	mappings, err := pagetable.Mappings(s.process.PID)
	if err != nil {
		return err
	}
	h := &HeldOff{}
	for _, m := range mappings {
		for _, r := range all {
			part := pagetable.Range{Start: max(m.Start, r.Start), End: min(m.End, r.End)}
			if part.Start >= part.End {
				continue
			}
			if discards && !m.Flags.Locked() { // what QEMU has locked itself stays so
				h.Locked = append(h.Locked, part)
			}
			if merging && m.Flags.Mergeable() {
				h.NotMerged = append(h.NotMerged, part)
			}
		}
	}
	if len(h.Locked) == 0 && len(h.NotMerged) == 0 {
		return nil
	}
	if len(h.Locked) > 0 {
		var old unix.Rlimit
		if err := unix.Prlimit(s.process.PID, unix.RLIMIT_MEMLOCK, nil, &old); err != nil {
			return fmt.Errorf("read the limit on locked memory of %v: %w", s.process, err)
		}
		h.MemlockSoft, h.MemlockHard = old.Cur, old.Max
	}
	// In the record first, so that it is undone whatever happens.
	s.record.HeldOff = h
	if err := s.write(s.record.Valid, s.record.Reason); err != nil {
		return err
	}
	return h.do(ctx, s.process)
}

// LetBe undoes what HoldOff did, in this capture or in one that was killed. It does nothing where there is nothing to undo.
func (s *Session) LetBe(ctx context.Context) error {
	if s.record.HeldOff == nil {
		return nil
	}
	if err := s.record.HeldOff.undo(ctx, s.process); err != nil {
		return err
	}
	s.record.HeldOff = nil
	return s.write(s.record.Valid, s.record.Reason)
}

func (h *HeldOff) do(ctx context.Context, p Process) error {
	if len(h.Locked) > 0 {
		// By as much as is locked, and no more.
		var bytes uint64
		for _, r := range h.Locked {
			bytes += r.End - r.Start
		}
		raised := func(limit uint64) uint64 {
			if limit > unix.RLIM_INFINITY-bytes {
				return unix.RLIM_INFINITY
			}
			return limit + bytes
		}
		limit := unix.Rlimit{Cur: raised(h.MemlockSoft), Max: raised(h.MemlockHard)}
		// It takes a privilege that containers may lack, and is not needed for a process that may lock what it likes.
		unix.Prlimit(p.PID, unix.RLIMIT_MEMLOCK, &limit, nil) //nolint:errcheck // see above
	}
	err := errors.Join(each(ctx, p, h.Locked, inject.LockOnFault), each(ctx, p, h.NotMerged, mergeable(false)))
	if err != nil {
		return fmt.Errorf("keep guarded memory of %v from being given back: %w", p, err)
	}
	return nil
}

func (h *HeldOff) undo(ctx context.Context, p Process) error {
	err := errors.Join(each(ctx, p, h.Locked, inject.Unlock), each(ctx, p, h.NotMerged, mergeable(true)))
	if err == nil && len(h.Locked) > 0 {
		before := unix.Rlimit{Cur: h.MemlockSoft, Max: h.MemlockHard}
		err = unix.Prlimit(p.PID, unix.RLIMIT_MEMLOCK, &before, nil)
	}
	if err != nil && !errors.Is(alive(p), ErrGone) {
		return fmt.Errorf("let guarded memory of %v be given back again: %w", p, err)
	}
	return nil
}

func mergeable(may bool) func(start, bytes uint64) inject.Operation {
	return func(start, bytes uint64) inject.Operation { return inject.Mergeable(start, bytes, may) }
}

// each has an operation done on all the ranges, on some at a time. What is not mapped any more, or beyond the limit on locked memory, is passed
// over.
func each(ctx context.Context, p Process, ranges []pagetable.Range, operation func(start, bytes uint64) inject.Operation) error {
	var program inject.Program
	var bytes uint64
	flush := func() error {
		if len(program) == 0 {
			return nil
		}
		_, err := inject.Do(ctx, p.PID, program)
		if errors.Is(err, unix.ENOMEM) && len(program) > 1 { // a part of one of them: the others are done one by one
			err = nil
			for _, op := range program {
				if _, one := inject.Do(ctx, p.PID, inject.Program{op}); one != nil && !errors.Is(one, unix.ENOMEM) {
					err = errors.Join(err, one)
				}
			}
		} else if errors.Is(err, unix.ENOMEM) {
			err = nil
		}
		program, bytes = nil, 0
		return err
	}
	for _, r := range ranges {
		for at := r.Start; at < r.End; at += holdOffBytes {
			n := min(holdOffBytes, r.End-at)
			program = append(program, operation(at, n))
			if bytes += n; bytes >= stopBytes || len(program) >= stopCalls {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// ksmRuns says whether the kernel is merging pages now.
func ksmRuns() (bool, error) {
	text, err := os.ReadFile("/sys/kernel/mm/ksm/run")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("see whether KSM runs: %w", err)
	}
	return strings.TrimSpace(string(text)) == "1", nil // 2 has it take apart what it merged
}
