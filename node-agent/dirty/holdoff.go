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
	Ranges []pagetable.Range `json:"ranges"`

	Locked      bool   `json:"locked,omitempty"`     // so that it cannot be given back
	MemlockSoft uint64 `json:"memlockSoft,omitzero"` // bytes; the process's limits (RLIMIT_MEMLOCK) before
	MemlockHard uint64 `json:"memlockHard,omitzero"`

	NotMerged bool `json:"notMerged,omitempty"`
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
	h := &HeldOff{}
	for i, b := range s.blocks {
		for _, part := range spansOf(b, pages[i]) {
			h.Ranges = append(h.Ranges, pagetable.Range{Start: part.start, End: part.end})
			h.Locked = h.Locked || b.Discards
		}
	}
	var err error
	if h.NotMerged, err = merging(s.process.PID, h.Ranges); err != nil {
		return err
	}
	if !h.Locked && !h.NotMerged {
		return nil
	}
	if h.Locked {
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
	if h.Locked {
		all := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if err := unix.Prlimit(p.PID, unix.RLIMIT_MEMLOCK, &all, nil); err != nil {
			return fmt.Errorf("raise the limit on locked memory of %v: %w", p, err)
		}
	}
	err := h.each(ctx, p, func(start, bytes uint64) (ops inject.Program) {
		if h.Locked {
			ops = append(ops, inject.LockOnFault(start, bytes))
		}
		if h.NotMerged {
			ops = append(ops, inject.Mergeable(start, bytes, false))
		}
		return ops
	})
	if err != nil {
		return fmt.Errorf("keep guarded memory of %v from being given back: %w", p, err)
	}
	return nil
}

func (h *HeldOff) undo(ctx context.Context, p Process) error {
	err := h.each(ctx, p, func(start, bytes uint64) (ops inject.Program) {
		if h.Locked {
			ops = append(ops, inject.Unlock(start, bytes))
		}
		if h.NotMerged {
			ops = append(ops, inject.Mergeable(start, bytes, true))
		}
		return ops
	})
	if errors.Is(err, unix.ENOMEM) {
		err = nil // it is not mapped any more, and nothing is left to undo
	}
	if err == nil && h.Locked {
		before := unix.Rlimit{Cur: h.MemlockSoft, Max: h.MemlockHard}
		err = unix.Prlimit(p.PID, unix.RLIMIT_MEMLOCK, &before, nil)
	}
	if err != nil && !errors.Is(alive(p), ErrGone) {
		return fmt.Errorf("let guarded memory of %v be given back again: %w", p, err)
	}
	return nil
}

// each has operations done on all the ranges, some at a time.
func (h *HeldOff) each(ctx context.Context, p Process, operations func(start, bytes uint64) inject.Program) error {
	var program inject.Program
	var bytes uint64
	flush := func() error {
		if len(program) == 0 {
			return nil
		}
		_, err := inject.Do(ctx, p.PID, program)
		program, bytes = nil, 0
		return err
	}
	for _, r := range h.Ranges {
		for at := r.Start; at < r.End; at += holdOffBytes {
			n := min(holdOffBytes, r.End-at)
			program = append(program, operations(at, n)...)
			if bytes += n; bytes >= stopBytes || len(program) >= stopCalls {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// merging says whether the kernel may be merging pages of the ranges now.
func merging(pid int, ranges []pagetable.Range) (bool, error) {
	text, err := os.ReadFile("/sys/kernel/mm/ksm/run")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("see whether KSM runs: %w", err)
	}
	if strings.TrimSpace(string(text)) != "1" { // 2 has it take apart what it merged
		return false, nil
	}
	mappings, err := pagetable.Mappings(pid)
	if err != nil {
		return false, err
	}
	for _, m := range mappings {
		for _, r := range ranges {
			if m.Flags.Mergeable() && m.Start < r.End && r.Start < m.End {
				return true, nil
			}
		}
	}
	return false, nil
}
