package dirty

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// witness is a source that is compared with the page tables; tests put another in the log's place.
type witness interface {
	covered() Sets  // pages that it can be compared for; nil where it cannot be
	complete() bool // all main memory is among them
}

// Comparison is what a witness had to say of the time between two standstills.
type Comparison struct {
	Witness string

	// Missed are the pages that the witness saw written and the page tables did not, those aside that are unpopulated now. There must be
	// none: where there are, everything is dirty, for nobody knows what else was missed.
	Missed Sets
	// Extra says that such pages are to be expected and are taken as dirty, and no more: see [Session.Nested].
	Extra bool
	// Whole says that the witness looks at all main memory.
	Whole bool
	// Unseen is how many pages only the page tables saw written, where the witness looks: what devices alone wrote.
	Unseen uint64
}

// Alarm says that the page tables missed a write.
func (c *Comparison) Alarm() bool { return c != nil && !c.Extra && c.Missed.Count() > 0 }

// compare compares the witness with the page tables; nil where there is none, or they do not count from the same standstill.
func (u *Union) compare(in *Instant) *Comparison {
	if !u.level || in.Unknown != nil {
		return nil
	}
	var covered Sets
	var whole bool
	for _, s := range u.sources {
		if w, ok := s.(witness); ok {
			covered, whole = w.covered(), w.complete()
		}
	}
	if covered == nil {
		return nil
	}
	missed, err := in.Minus(kvmLogName, pageTablesName)
	if err != nil {
		return nil // it was dropped as it was asked, or there are no page tables
	}
	// Given back since they were written, they read as zeros now, and are taken as that.
	missed.Subtract(in.Holes)
	c := &Comparison{Witness: kvmLogName, Missed: missed, Extra: u.nested, Whole: whole}
	unseen := covered
	for _, p := range in.Parts {
		switch p.Source {
		case kvmLogName:
			unseen.Subtract(p.since)
		case pageTablesName:
			unseen.Intersect(p.since)
			for i, set := range unseen {
				if !p.complete[i] {
					set.Clear()
				}
			}
		}
	}
	c.Unseen = unseen.Count()
	return c
}

// Nested says whether the guest runs guests of its own. For those hardware writes pages that KVM has mapped for it, past all page tables, and KVM
// notes them in its log: pages of the log's alone are then no alarm.
func (s *Session) Nested(nested bool) {
	s.nested = nested
	s.record.Nested = nested // on the disk with the next write
}

// Witnessed says whether the log of all main memory counts from the last standstill, so that what is written past the page tables for nested
// guests is known.
func (s *Session) Witnessed() bool { return s.witness != nil && s.witness.complete() }

// RanNested says whether the guest ran guests of its own when that was last looked at.
func (s *Session) RanNested() bool { return s.record.Nested }

// Distrust makes everything dirty at every instant of this session: something writes memory past all that is looked at.
func (s *Session) Distrust() { s.distrust = true }

// Unwitnessed says why there is no witness, where one was asked for; nil where there is one, and under another accelerator than KVM.
func (s *Session) Unwitnessed() error {
	switch {
	case s.witness == nil || errors.Is(s.witness.dropped, errNoKVM) || s.witness.stop:
		return nil
	}
	return s.witness.dropped
}

// LogTimes returns what the witness cost in the last standstill.
func (s *Session) LogTimes() LogTimes {
	if s.witness == nil {
		return LogTimes{}
	}
	return s.witness.took
}

// Migration is to be told after each standstill whether a migration is under way. If so, one that began right before the standstill may take
// what the log was cleared of for sent: all is made dirty for it.
func (s *Session) Migration(ctx context.Context, active bool) error {
	k := s.witness
	if k == nil || len(k.cleared) == 0 {
		return nil
	}
	cleared := k.cleared
	k.cleared = nil
	if !active {
		return nil
	}
	k.drop(errors.New("a migration has the log"))
	refill := inject.RefillDirtyLogs(k.record.VM, cleared)
	_, err := k.helper.Do(ctx, inject.Program{refill})
	if errors.Is(err, inject.ErrHelper) {
		// It may have died with the log switched off.
		err = k.again(ctx, inject.Program{inject.FindMemorySlots(k.record.VM, cleared, k.record.Address), refill})
	}
	if err != nil {
		return fmt.Errorf("make the KVM log whole for a migration that began: %w", err)
	}
	return nil
}

// again has a program done by a new helper.
func (k *KVMLog) again(ctx context.Context, program inject.Program) error {
	thread, err := inject.MonitorThread(k.pid)
	if err != nil {
		return err
	}
	helper, err := inject.StartResident(ctx, k.pid, thread)
	if err != nil {
		return err
	}
	defer helper.Close() //nolint:errcheck // it has nothing to say
	_, err = helper.Do(ctx, program)
	return err
}

// Unproven says whether the log was cleared since the session was last told of migrations.
func (s *Session) Unproven() bool { return s.witness != nil && len(s.witness.cleared) > 0 }

// withWitness adds the witness to the sources, where one is wanted or is to be switched off.
func (s *Session) withWitness(ctx context.Context, sources ...Source) []Source {
	if s.uffd == nil || len(s.wanted) == 0 && s.record.Witness == nil {
		return sources
	}
	k := &KVMLog{blocks: s.blocks, pid: s.process.PID, bound: s.logBound}
	if k.bound == 0 {
		k.bound = 50 * time.Millisecond
	}
	s.witness = k
	if old := s.record.Witness; old != nil {
		k.record = *old
	}
	if err := s.openWitness(ctx, k); err != nil {
		k.drop(err)
	}
	if s.witness == nil {
		return sources
	}
	return append(sources, k)
}

// openWitness makes the log ready for the next standstill.
func (s *Session) openWitness(ctx context.Context, k *KVMLog) error {
	pid := s.process.PID
	if len(s.wanted) == 0 && len(k.record.Slots) == 0 {
		err := takeOutWitness(ctx, pid, &k.record)
		if err == nil {
			s.record.Witness = nil
			s.witness = nil
		}
		return err
	}
	vm, err := virtualMachine(pid)
	if err != nil {
		return err
	}
	thread, err := inject.MonitorThread(pid)
	if err != nil {
		return err
	}
	if k.helper, err = inject.StartResident(ctx, pid, thread); err != nil {
		return err
	}
	if len(s.wanted) == 0 {
		k.stop = true
		for _, slot := range k.record.Slots {
			k.slots = append(k.slots, logRange{MemorySlot: slot})
		}
		return nil
	}
	bytes := k.layOut(s.wanted)
	if k.record.VM != vm || k.record.Bytes != bytes || k.record.File.Check(pid) != nil || !k.record.File.MappedAt(pid, k.record.Address, bytes) {
		if err := s.shareMemory(ctx, k, bytes); err != nil {
			return err
		}
		k.record.VM = vm
	}
	if k.file, err = k.record.File.Duplicate(pid); err != nil {
		return err
	}
	for i := range k.ranges {
		k.ranges[i].Bitmap += k.record.Address
	}
	// What the record says of slots holds if it is valid. Else the log may have been cleared after the record was written.
	if s.unknown == nil && slices.Equal(k.record.Ranges, memorySlots(k.ranges)) {
		for _, slot := range k.record.Slots {
			i := slices.IndexFunc(k.ranges, func(r logRange) bool { return r.Bitmap == slot.Bitmap })
			if i < 0 {
				return errors.New("the session record is of other memory slots")
			}
			r := k.ranges[i]
			r.MemorySlot = slot
			k.slots = append(k.slots, r)
		}
		k.counts = len(k.slots) > 0
	}
	k.record.Ranges = memorySlots(k.ranges)
	if !k.counts {
		k.record.Slots = nil
	}
	return nil
}

// layOut gives each range its place for the bitmap, as an offset for now, and returns how much memory they take. QEMU may have put another slot
// under a number by the time that its log is read, so there is room behind the last for the largest there can be.
func (k *KVMLog) layOut(wanted []qemu.GuestRange) (bytes uint64) {
	for _, r := range wanted {
		b := k.blocks[r.Block]
		slot := inject.MemorySlot{GPA: r.GPA, Bytes: r.Bytes, HVA: b.HVA + r.OffsetBytes, Bitmap: bytes}
		k.ranges = append(k.ranges, logRange{slot.InSpace(r.Space), r.Block, r.OffsetBytes / pageset.PageBytes})
		bytes += uint64(bitmapBytes(r.Bytes / pageset.PageBytes))
	}
	for _, b := range k.blocks {
		bytes += uint64(bitmapBytes(b.Pages()))
	}
	return (bytes + pageset.PageBytes - 1) &^ (pageset.PageBytes - 1)
}

// shareMemory makes the memory for the bitmaps in the process, in place of what there was.
func (s *Session) shareMemory(ctx context.Context, k *KVMLog, bytes uint64) error {
	pid := s.process.PID
	if err := takeOutWitness(ctx, pid, &k.record); err != nil {
		return err
	}
	k.record = Witness{}
	report, err := inject.Do(ctx, pid, inject.Program{inject.OpenSharedMemory("vmckpt-dirty-log", bytes)})
	if err != nil {
		return err
	}
	k.record.File, k.record.Address, k.record.Bytes = report.Files[0], report.Addresses[0], bytes
	// In the record at once, so that whoever comes after a crash finds it.
	return s.write(s.record.Valid, s.record.Reason)
}

// takeOutWitness takes the shared memory out of the process. The log stays as it is: it can be switched off in a standstill alone.
func takeOutWitness(ctx context.Context, pid int, w *Witness) error {
	if w.File.Link == "" {
		return nil
	}
	_, err := inject.Do(ctx, pid, inject.Program{inject.Unmap(w.File, w.Address, w.Bytes), inject.Close(w.File)})
	if errors.Is(err, inject.ErrIdentity) || errors.Is(err, inject.ErrGone) {
		return nil
	}
	return err
}
