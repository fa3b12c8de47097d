package dirty

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/evict"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// DefaultRecordDir is where the node keeps session records: gone with the boot that they are of.
const DefaultRecordDir = "/run/vmckpt"

// UnknownError says why nothing is known of what was written since an image. All pages are pending then, and the
// image's writer finds out by content hash.
type UnknownError struct{ Reason string }

func (e *UnknownError) Error() string { return "tracking state unknown: " + e.Reason }

// Reasons of an [UnknownError].
const (
	noRecord      = "this host has no record of tracking"
	noUserfaultfd = "the process has no userfaultfd of this session"
)

// Options are the parameters of a session.
type Options struct {
	// Witness has KVM's dirty log kept of these ranges, as a second opinion: see [KVMLog].
	Witness []qemu.GuestRange

	// WitnessBound is how long one look at that log may take in a standstill before the session goes on without; default 50 ms.
	WitnessBound time.Duration

	// For tests alone.
	Now    func() time.Time       // the clock; nil is time.Now
	BootID func() (string, error) // nil reads the kernel's
}

// Session is the tracking of one QEMU process, and this process's alone as long as it is open. One goroutine uses it.
type Session struct {
	*Union

	process   Process
	blocks    []Block
	untracked []error // by block; nil for those that are tracked

	dir     *os.Root
	lock    *os.File
	record  Record        // as it is on the disk
	unknown *UnknownError // unless the record was valid at Open or has become so
	now     func() time.Time

	pending  *Pending
	pagemap  *pagetable.Pagemap
	uffd     *pagetable.Userfaultfd
	memory   []*evict.Memory
	pages    *PageTables
	lent     Sets // to a guard
	wanted   []qemu.GuestRange
	logBound time.Duration
	witness  *KVMLog // nil where none is wanted

	noTracking error // why this kernel or process allows none
}

// Open opens the session of a process, in the record directory of its node, and begins tracking where it is not under
// way. The process has to be able to be injected into only when it has no userfaultfd of ours yet.
//
// It fails with [ErrBusy] where another process has the session and [ErrGone] where the process is no more. Blocks
// that cannot be tracked are no error: they are all dirty each time ([Session.Untracked] says why).
func Open(ctx context.Context, p Process, blocks []Block, recordDir string, o Options) (_ *Session, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open capture session of %v: %w", p, err)
		}
	}()
	if err := checkLayout(blocks); err != nil {
		return nil, err
	}
	if err := alive(p); err != nil {
		return nil, err
	}
	s := &Session{process: p, blocks: slices.Clone(blocks), pending: NewPending(blocks), wanted: o.Witness, logBound: o.WitnessBound, now: o.Now}
	if s.now == nil {
		s.now = time.Now
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	bootID := o.BootID
	if bootID == nil {
		bootID = currentBoot
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if s.dir, s.lock, err = openRecordDir(recordDir, p); err != nil {
		return nil, err
	}
	if s.pagemap, err = pagetable.OpenPagemap(p.PID); err != nil {
		return nil, err
	}
	if err := s.load(boot); err != nil {
		return nil, err
	}
	if err := s.openUserfaultfd(ctx); err != nil {
		return nil, err
	}
	if err := s.track(ctx); err != nil {
		return nil, err
	}
	if s.unknown != nil {
		s.pending.AddAll()
		if s.record.Valid {
			if err := s.write(false, s.unknown.Reason); err != nil {
				return nil, err
			}
		}
	}
	// The pid was looked at by name until here. All that is kept open now belongs to the process meant, if it still
	// is the one.
	if err := alive(p); err != nil {
		return nil, err
	}
	return s, nil
}

func checkLayout(blocks []Block) error {
	sorted := slices.Clone(blocks)
	slices.SortFunc(sorted, func(a, b Block) int {
		if a.HVA < b.HVA {
			return -1
		}
		return 1
	})
	for i, b := range sorted {
		if err := b.check(); err != nil {
			return err
		}
		if i > 0 && sorted[i-1].End() > b.HVA {
			return fmt.Errorf("blocks %s and %s overlap", sorted[i-1].Name, b.Name)
		}
	}
	return nil
}

func openRecordDir(name string, p Process) (*os.Root, *os.File, error) {
	if err := os.MkdirAll(name, 0o700); err != nil {
		return nil, nil, fmt.Errorf("record directory: %w", err)
	}
	dir, err := os.OpenRoot(name)
	if err != nil {
		return nil, nil, fmt.Errorf("record directory: %w", err)
	}
	lock, err := lockSession(dir, p)
	if err != nil {
		dir.Close()
		return nil, nil, err
	}
	return dir, lock, nil
}

// load reads the record and decides whether it is to be believed. s.record is what the session goes on with.
func (s *Session) load(boot string) error {
	fresh := Record{Version: recordVersion, Process: s.process, BootID: boot, LayoutDigest: LayoutDigest(s.blocks)}
	old, err := readRecord(s.dir, s.process)
	if err != nil {
		reason := err.Error()
		if errors.Is(err, fs.ErrNotExist) {
			reason = noRecord
		}
		s.record = fresh
		s.disbelieve(reason)
		return nil
	}
	if old.BootID != boot {
		// Nothing of the old record means anything: not even the process is the same.
		s.record = fresh
		s.disbelieve("session record is of another boot")
		return nil
	}
	s.record = *old
	s.record.LayoutDigest = fresh.LayoutDigest
	switch {
	case !old.Valid && old.Reason != "":
		s.disbelieve(old.Reason) // a whole reason, as it was written
	case !old.Valid:
		s.disbelieve("session record is invalid")
	case old.LayoutDigest != fresh.LayoutDigest:
		s.disbelieve("memory layout differs from the session record's")
	case old.Image.Name == "" || old.Image.Digest == "":
		s.disbelieve("session record names no image")
	}
	return nil
}

// disbelieve makes the past unknown. The first reason is the one that is kept.
func (s *Session) disbelieve(reason string) {
	if s.unknown == nil {
		s.unknown = &UnknownError{Reason: reason}
	}
}

// openUserfaultfd gets hold of the userfaultfd in the process that the record names, or makes a new one.
//
// Another one of ours, which the record does not name, is never gone on with, even though it would do: it belongs to
// a session whose record is elsewhere or lost, and that one would go on trusting its own record while this session
// takes its pages. It is taken out, so that the other finds out.
func (s *Session) openUserfaultfd(ctx context.Context) error {
	present, err := trackers(s.process.PID)
	if err != nil {
		return err
	}
	ours := s.record.Userfaultfd
	for _, file := range present {
		if file == ours {
			continue
		}
		if err := takeOut(ctx, s.process.PID, file); err != nil {
			return err
		}
	}
	if slices.Contains(present, ours) {
		local, err := ours.Duplicate(s.process.PID)
		if err != nil {
			return err
		}
		s.uffd = &pagetable.Userfaultfd{File: local}
		return nil
	}
	s.disbelieve(noUserfaultfd)
	// On the disk before there is one: the record must not be valid any more when the first page is protected through it.
	if err := s.write(false, s.unknown.Reason); err != nil {
		return err
	}
	remote, local, err := inject.NewUserfaultfd(ctx, s.process.PID)
	if unsupported(err) {
		s.noTracking = err
		return nil
	}
	if err != nil {
		return err
	}
	uffd := &pagetable.Userfaultfd{File: local}
	if _, err := uffd.API(pagetable.FeaturesAsyncWriteTracks); err != nil {
		closed := errors.Join(local.Close(), inject.CloseFD(ctx, s.process.PID, remote))
		if unsupported(err) && closed == nil {
			s.noTracking = err
			return nil
		}
		return errors.Join(err, closed)
	}
	s.uffd = uffd
	s.record.Userfaultfd = remote
	return s.write(false, s.unknown.Reason)
}

// unsupported says whether tracking is impossible here and will be the next time, so that the content hash has to do.
func unsupported(err error) bool {
	for _, target := range []error{pagetable.ErrUnsupported, inject.ErrUnsupported, inject.ErrSeccomp, unix.ENOSYS, unix.EPERM, unix.EINVAL} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// track registers every block that can be tracked, and builds the sources. A block that was tracked and is not
// registered any more (unmapped and mapped anew, say) makes the past unknown.
func (s *Session) track(ctx context.Context) error {
	mappings, err := pagetable.Maps(s.process.PID)
	if err != nil {
		return err
	}
	if s.unknown == nil {
		if err := s.stillRegistered(mappings); err != nil {
			s.disbelieve(err.Error())
		}
	}
	s.memory = make([]*evict.Memory, len(s.blocks))
	s.untracked = make([]error, len(s.blocks))
	tracked, covered := make([]*evict.Memory, len(s.blocks)), make([]*evict.Memory, len(s.blocks))
	var names []string
	for i, b := range s.blocks {
		m, err := evict.Resolve(s.process.PID, mappings, b.HVA, b.End())
		if err != nil {
			return fmt.Errorf("block %s: %w", b.Name, err)
		}
		s.memory[i] = m
		s.untracked[i] = trackable(b, m)
		switch {
		case s.untracked[i] != nil:
		case s.uffd == nil:
			s.untracked[i] = fmt.Errorf("block %s: %w: %w", b.Name, ErrUntracked, s.noTracking)
		default:
			err := s.register(ctx, b)
			if errors.Is(err, pagetable.ErrOwned) {
				return fmt.Errorf("block %s: %w: %w", b.Name, ErrBusy, err)
			}
			s.untracked[i] = err
		}
		if s.untracked[i] == nil {
			tracked[i] = m
			names = append(names, b.Name)
		} else {
			covered[i] = m
		}
	}
	s.record.Tracked = names // on the disk with the next write, which comes before the record can be valid for them
	pid := s.process.PID
	s.lent = NewSets(s.blocks)
	s.pages = &PageTables{blocks: s.blocks, tracked: tracked, lent: s.lent, pagemap: s.pagemap, uffd: s.uffd,
		maps: func(within []pagetable.Range) ([]pagetable.Mapping, error) { return pagetable.MapsWithin(pid, within) }}
	hash := &ContentHash{blocks: s.blocks, covered: covered, pagemap: s.pagemap}
	s.Union = NewUnion(s.blocks, s.pending, s.Invalidate, s.withWitness(ctx, s.pages, hash)...)
	s.level, s.nested = s.unknown == nil, s.record.Nested
	return s.Union.Arm(ctx)
}

// ownedFor is how long the guard of a capture that was killed may take to be gone.
const ownedFor = 10 * time.Second

// register registers a block. Where a guard that nobody needs any more is being lifted, it waits for that.
func (s *Session) register(ctx context.Context, b Block) error {
	for until := time.Now().Add(ownedFor); ; {
		err := s.uffd.Register(b.HVA, b.Bytes, pagetable.ModeWriteProtect)
		if !errors.Is(err, pagetable.ErrOwned) || time.Now().After(until) || ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// trackable says why the page tables cannot tell what is written to a block.
func trackable(b Block, m *evict.Memory) error {
	switch {
	case m.Backing == evict.Other:
		// The content of a private mapping of a file comes back when its page is discarded, and a file on a disk is
		// written back and unmapped at any time.
		return fmt.Errorf("block %s: %w: %v", b.Name, ErrUntracked, m.Backing)
	case m.Backing != evict.Anonymous && b.Discards:
		return fmt.Errorf("block %s: %w: %v into which holes may be punched", b.Name, ErrUntracked, m.Backing)
	}
	return nil
}

// stillRegistered checks against the process's own mappings that the blocks which the record calls tracked are
// registered whole. A scan of a mapping's first page fails where the mapping is not; smaps would tell as well, but walks all page tables
// for it (measured: 50 ms for 4 GiB).
func (s *Session) stillRegistered(mappings []pagetable.Mapping) error {
	for _, b := range s.blocks {
		if !slices.Contains(s.record.Tracked, b.Name) {
			continue // all dirty at the last image, and so it is now, even if it can be tracked by this time
		}
		parts, err := evict.Cover(mappings, b.HVA, b.End())
		if err != nil {
			return fmt.Errorf("block %s: %w", b.Name, err)
		}
		for _, part := range parts {
			first := max(part.Start, b.HVA)
			args := pagetable.ScanArgs{Start: first, End: first + pageset.PageBytes, CheckAsync: true, CategoryMask: written, ReturnMask: written}
			if err := s.pagemap.Scan(args, func(pagetable.Region) error { return nil }); err != nil {
				return fmt.Errorf("block %s: [%#x,%#x) is not registered any more: %w", b.Name, part.Start, part.End, err)
			}
		}
	}
	return nil
}

// Since makes the session count from an image: that of the record, or everything is pending and the error, an
// [*UnknownError], says why. It is no failure: the image will be right, and take longer.
func (s *Session) Since(parent Image) error {
	if s.record.Image != parent {
		s.disbelieve(otherImage(s.record.Image, parent))
	}
	if s.unknown == nil {
		return nil
	}
	s.pending.AddAll()
	return s.unknown
}

// otherImage says that tracking counts from an image which is not the parent.
func otherImage(tracked, parent Image) string {
	if tracked.Name == parent.Name {
		return fmt.Sprintf("tracking counts from another image that had the name %s, of another repository or deleted since", tracked.Name)
	}
	return fmt.Sprintf("tracking counts from image %s, and not from the parent", tracked.Name)
}

// SinceNothing makes everything pending, for an image without a parent.
func (s *Session) SinceNothing() { s.pending.AddAll() }

// Image returns the image that the session counts from, or an [*UnknownError].
func (s *Session) Image() (Image, error) {
	if s.unknown != nil {
		return Image{}, s.unknown
	}
	return s.record.Image, nil
}

// Untracked returns why each block is not tracked; nil for those that are.
func (s *Session) Untracked() []error { return slices.Clone(s.untracked) }

// Tracked fails with [ErrUntracked] where tracking is not this session's own any more: somebody with another record directory, who does not
// see its lock, has taken its userfaultfd out of the process.
func (s *Session) Tracked() error {
	if s.uffd == nil {
		return nil
	}
	if err := s.record.Userfaultfd.Check(s.process.PID); err != nil {
		return fmt.Errorf("%w: another session has taken %v over: %w", ErrUntracked, s.process, err)
	}
	return nil
}

// Memory returns what backs each block.
func (s *Session) Memory() []*evict.Memory { return slices.Clone(s.memory) }

// Pending returns a copy of the pages that are harvested and in no sealed image.
func (s *Session) Pending() Sets { return s.pending.Pages() }

// Leash returns what the last capture learned for the leash, or nil.
func (s *Session) Leash() *Leash { return s.record.Leash }

// SetLeash keeps what this capture learned for the leash, in the record as well.
func (s *Session) SetLeash(l *Leash) error {
	s.record.Leash = l
	return s.write(s.record.Valid, s.record.Reason)
}

// AbandonPipe keeps the pipe of an earlier capture whose command may still come, and closes those of long ago. The machine's monitor must have
// answered since the session was opened. now is the time since boot.
func (s *Session) AbandonPipe(ctx context.Context, pipe *inject.RemoteFile, now time.Duration) error {
	var kept []AbandonedPipe
	for _, a := range s.record.Abandoned {
		if now-a.Since < abandonedFor {
			kept = append(kept, a)
		} else if err := closeRemote(ctx, s.process.PID, a.Pipe); err != nil {
			return fmt.Errorf("close the pipe of a capture that was killed: %w", err)
		}
	}
	if pipe != nil {
		kept = append(kept, AbandonedPipe{*pipe, now})
		s.record.Leash = nil
	}
	s.record.Abandoned = kept // on the disk with the next write
	return nil
}

// Invalidate makes the record invalid, and returns when it is so on the disk. Every call that re-arms does this by
// itself; called before a standstill it keeps the writing out of it.
func (s *Session) Invalidate(context.Context) error {
	if !s.record.Valid {
		return nil
	}
	return s.write(false, "a capture was begun and its image not sealed")
}

// Sealed says that the image of an instant is sealed: the instant's pages are not pending any more, the session
// counts from that image, and the record says so and is valid. Where pages were harvested since the instant it stays
// invalid, as they are known to this process alone; the error then is an [*UnknownError], and the image is good all
// the same.
func (s *Session) Sealed(in *Instant, image Image) error {
	if err := alive(s.process); err != nil {
		return err
	}
	none := s.pending.sealed(in.number)
	s.record.Image, s.unknown = image, nil
	if !none {
		return &UnknownError{Reason: "pages were harvested that are not in the image"}
	}
	return s.write(true, "")
}

// write writes the record.
func (s *Session) write(valid bool, reason string) error {
	if s.witness != nil {
		s.record.Witness = &s.witness.record
	}
	r := s.record
	r.Valid, r.Reason, r.Updated = valid, reason, s.now().UTC()
	if valid {
		// Before the attempt: one that fails may have reached the disk, and has to be taken back before pages are
		// re-armed.
		s.record.Valid = true
	}
	if err := writeRecord(s.dir, &r); err != nil {
		return err
	}
	s.record = r
	return nil
}

// Close ends the session and leaves tracking armed in the process, for the next one to go on with.
func (s *Session) Close() error {
	var errs []error
	for _, m := range s.memory {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if s.witness != nil {
		errs = append(errs, s.witness.close())
	}
	if s.uffd != nil {
		errs = append(errs, s.uffd.Close())
	}
	if s.pagemap != nil {
		errs = append(errs, s.pagemap.Close())
	}
	// Last: with the lock gone another session may begin.
	if s.lock != nil {
		errs = append(errs, s.lock.Close(), s.dir.Close())
	}
	*s = Session{}
	return errors.Join(errs...)
}
