package dirty

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/inject"
)

// KVMLog is KVM's dirty log: what the vCPUs wrote, page by page, whatever the page tables of the host say. It misses what devices write, so
// it is a witness: nothing rests on it alone, and where it cannot be had nothing fails. It is then dropped, with a reason, for the session.
//
// What must hold:
//
//   - It is switched on, read and cleared only in a standstill. QEMU's main thread is held then with the lock under which memory slots change, so
//     that a slot is what it was found to be, and QEMU does not read the log itself.
//   - It is QEMU's log too. For a migration that began unseen before the standstill, pages that were cleared count as sent; [Session.Migration]
//     makes everything dirty for it then. A migration that ends switches the log off, which shows (ENOENT).
//   - The memory of screens is left alone: there QEMU clears the log all the time.
//   - It counts from where the page tables count, or from later.
type KVMLog struct {
	blocks []Block
	pid    int
	helper *inject.Resident
	file   *os.File // of the memory shared with the process, where the bitmaps are

	ranges []logRange // that are to be logged
	slots  []logRange // of those, what KVM has under a number and logs
	counts bool       // the log of slots counts from the last standstill
	stop   bool       // it is not wanted any more, and is to be switched off in the next standstill

	cleared []inject.MemorySlot // since it was last known that no migration is under way
	bound   time.Duration       // of one call in a standstill: the machine can do without the log
	dropped error               // why it says nothing in this session

	took LogTimes // in the last standstill

	record Witness // of all that, for the session record
}

// logRange is a range of guest memory with its place in the layout.
type logRange struct {
	inject.MemorySlot
	block     int
	firstPage uint64
}

// Witness is what the session record keeps of the KVM log.
type Witness struct {
	VM      inject.RemoteFile   `json:"vm"`
	File    inject.RemoteFile   `json:"file"`    // shared memory in the process
	Address uint64              `json:"address"` // where it is mapped there
	Bytes   uint64              `json:"bytes"`
	Ranges  []inject.MemorySlot `json:"ranges,omitempty"` // that were looked for
	Slots   []inject.MemorySlot `json:"slots,omitempty"`  // that are logged; their log counts from the image of the record
}

// LogTimes is what the log cost in a standstill.
type LogTimes struct {
	Find  time.Duration // ns; looking for the slots and switching the log on, once
	Read  time.Duration // ns
	Clear time.Duration // ns
}

// kvmLogName names the source in reports.
const kvmLogName = "KVM dirty log"

// errNoKVM: the process is none that uses KVM.
var errNoKVM = errors.New("the machine does not run under KVM")

// Name is "KVM dirty log".
func (k *KVMLog) Name() string { return kvmLogName }

// Complete is false: devices' writes do not show.
func (k *KVMLog) Complete(int) bool { return false }

// Arm does nothing: the log is switched on in a standstill.
func (k *KVMLog) Arm(context.Context) error { return nil }

// Estimate counts nothing: the log is read in a standstill.
func (k *KVMLog) Estimate(context.Context) (uint64, error) { return 0, nil }

// HarvestLive reports nothing and leaves the log as it is: it cannot be read and cleared in one step.
func (k *KVMLog) HarvestLive(context.Context) (Sets, error) { return make(Sets, len(k.blocks)), nil }

// HarvestStanding reads the log. The first time it looks for the slots and switches the log on: then it reports nothing.
func (k *KVMLog) HarvestStanding(ctx context.Context, still Standstill) (*Standing, error) {
	found := &Standing{Written: make(Sets, len(k.blocks)), Holes: make(Sets, len(k.blocks))}
	nothing := func(context.Context) (Sets, error) { return make(Sets, len(k.blocks)), nil }
	found.rearm = nothing
	k.took = LogTimes{}
	if k.dropped != nil || still.Err() != nil {
		return found, nil
	}
	if k.stop {
		found.rearm = func(ctx context.Context) (Sets, error) {
			if k.do(ctx, "switch off", inject.StopDirtyLogs(k.record.VM, memorySlots(k.slots))) {
				k.slots, k.record.Slots = nil, nil
			}
			return nothing(ctx)
		}
		return found, nil
	}
	begin := time.Now()
	if len(k.slots) == 0 {
		if !k.find(ctx) {
			return found, nil
		}
		k.took.Find = time.Since(begin)
		found.rearm = func(ctx context.Context) (Sets, error) {
			begin := time.Now()
			k.clearAll(ctx)
			k.took.Clear = time.Since(begin)
			return nothing(ctx)
		}
		return found, nil
	}
	written, ok := k.read(ctx)
	if !ok {
		return found, nil
	}
	k.took.Read = time.Since(begin)
	found.Written = written
	found.rearm = func(ctx context.Context) (Sets, error) {
		// The bitmaps in the process are those that were read: what is cleared is what was reported.
		begin := time.Now()
		if !k.clear(ctx) {
			return nothing(ctx)
		}
		k.took.Clear = time.Since(begin)
		return written.Clone(), nil
	}
	return found, nil
}

// find looks for the slots, and switches their logs on. Everything is dirty in a new one.
func (k *KVMLog) find(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, k.bound)
	defer cancel()
	report, err := k.helper.Do(ctx, inject.Program{inject.FindMemorySlots(k.record.VM, memorySlots(k.ranges), k.record.Address)})
	if err != nil {
		k.drop(fmt.Errorf("look for memory slots: %w", err))
		return false
	}
	for _, r := range k.ranges {
		i := slices.IndexFunc(report.Slots, func(s inject.MemorySlot) bool { return s.Bitmap == r.Bitmap })
		if i >= 0 {
			r.MemorySlot = report.Slots[i]
			k.slots = append(k.slots, r)
		}
	}
	if len(k.slots) == 0 {
		k.drop(errors.New("KVM has none of the memory slots that QEMU speaks of"))
		return false
	}
	return true
}

// read reads the log.
func (k *KVMLog) read(ctx context.Context) (Sets, bool) {
	if !k.do(ctx, "read", inject.ReadDirtyLogs(k.record.VM, memorySlots(k.slots))) {
		return nil, false
	}
	written := make(Sets, len(k.blocks))
	var bitmap []byte
	for _, s := range k.slots {
		pages := s.Bytes / pageset.PageBytes
		bitmap = slices.Grow(bitmap[:0], bitmapBytes(pages))[:bitmapBytes(pages)]
		// Not by memory of our own: the file is the process's, which can make it shorter.
		if _, err := k.file.ReadAt(bitmap, int64(s.Bitmap-k.record.Address)); err != nil {
			k.drop(fmt.Errorf("read the log: %w", err))
			return nil, false
		}
		if written[s.block] == nil {
			written[s.block] = pageset.New(k.blocks[s.block].Pages())
		}
		written[s.block].AddBitmap(s.firstPage, pages, bitmap)
	}
	return written, true
}

// clear takes out of the log what the bitmaps have.
func (k *KVMLog) clear(ctx context.Context) bool {
	k.counts = false
	k.cleared = memorySlots(k.slots) // also where it fails: in the middle, perhaps
	if !k.do(ctx, "clear", inject.ClearDirtyLogs(k.record.VM, memorySlots(k.slots))) {
		return false
	}
	k.counts = true
	k.record.Slots = memorySlots(k.slots)
	return true
}

// clearAll empties the log.
func (k *KVMLog) clearAll(ctx context.Context) {
	var ones []byte
	for _, s := range k.slots {
		for n := bitmapBytes(s.Bytes / pageset.PageBytes); len(ones) < n; {
			ones = append(ones, 0xff)
		}
		if _, err := k.file.WriteAt(ones[:bitmapBytes(s.Bytes/pageset.PageBytes)], int64(s.Bitmap-k.record.Address)); err != nil {
			k.drop(fmt.Errorf("clear: %w", err))
			return
		}
	}
	k.clear(ctx)
}

// do has an operation done, and drops the log where it fails.
func (k *KVMLog) do(ctx context.Context, what string, op inject.Operation) bool {
	ctx, cancel := context.WithTimeout(ctx, k.bound)
	defer cancel()
	_, err := k.helper.Do(ctx, inject.Program{op})
	switch {
	case errors.Is(err, unix.ENOENT):
		err = fmt.Errorf("QEMU has switched it off (a migration does): %w", err)
	case err == nil:
		return true
	}
	k.drop(fmt.Errorf("%s the log: %w", what, err))
	return false
}

// drop makes the log say nothing in this session. The next one looks for the slots anew.
func (k *KVMLog) drop(why error) {
	if k.dropped == nil {
		k.dropped = why
	}
	k.counts, k.slots, k.record.Slots = false, nil, nil
}

// covered are the pages that the log can be compared for; nil where it cannot be.
func (k *KVMLog) covered() Sets {
	if !k.counts {
		return nil
	}
	covered := NewSets(k.blocks)
	for _, s := range k.slots {
		covered[s.block].Add(pageset.Run{First: s.firstPage, Count: s.Bytes / pageset.PageBytes})
	}
	return covered
}

// complete says whether all ranges that are to be logged are, since the last standstill.
func (k *KVMLog) complete() bool { return k.counts && len(k.slots) == len(k.ranges) }

// close lets everything go. The log stays on, for the next session.
func (k *KVMLog) close() error {
	var errs []error
	if k.helper != nil {
		errs = append(errs, k.helper.Close())
	}
	if k.file != nil {
		errs = append(errs, k.file.Close())
	}
	return errors.Join(errs...)
}

func memorySlots(ranges []logRange) []inject.MemorySlot {
	var slots []inject.MemorySlot
	for _, r := range ranges {
		slots = append(slots, r.MemorySlot)
	}
	return slots
}

// bitmapBytes is the size of a log: whole words of 64 bits.
func bitmapBytes(pages uint64) int { return int((pages + 63) / 64 * 8) }

const kvmLink = "anon_inode:kvm-vm"

// virtualMachine finds the process's descriptor for its KVM virtual machine.
func virtualMachine(pid int) (inject.RemoteFile, error) {
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return inject.RemoteFile{}, fmt.Errorf("list descriptors of process %d: %w", pid, err)
	}
	var found []inject.RemoteFile
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			continue
		}
		if file, err := inject.Identify(pid, fd); err == nil && file.Link == kvmLink {
			found = append(found, file)
		}
	}
	switch len(found) {
	case 0:
		return inject.RemoteFile{}, errNoKVM
	case 1:
		return found[0], nil
	}
	return inject.RemoteFile{}, fmt.Errorf("process %d has %d virtual machines", pid, len(found))
}
