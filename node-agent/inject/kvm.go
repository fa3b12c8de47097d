package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// KVM takes the calls on a virtual machine only from the process that made it (virt/kvm/kvm_main.c, kvm_vm_ioctl: kvm->mm). The
// operations here are for a thread other than the main one, while QEMU's main thread is held with the lock that all changes of its memory slots
// are made under: only then a slot is what it was found to be.

// MemorySlot is a range of guest memory that KVM keeps under one number.
type MemorySlot struct {
	ID     uint32 `json:"id"` // the number; bits 16 and up are the address space: 1 is that of system management mode
	GPA    uint64 `json:"gpa"`
	Bytes  uint64 `json:"bytes"`
	HVA    uint64 `json:"hva"`    // in the process
	Bitmap uint64 `json:"bitmap"` // address in the process of its dirty log: a bit a page, in words of 64 bits
}

// Space is the slot's address space.
func (s MemorySlot) Space() uint32 { return s.ID >> spaceShift }

// InSpace returns the slot's range in an address space, its number there not known.
func (s MemorySlot) InSpace(space uint32) MemorySlot {
	s.ID = space << spaceShift
	return s
}

const (
	spaceShift    = 16 // Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION
	slotPageBytes = 4096
)

const (
	kindFindSlots  kind = "find-memory-slots"
	kindReadLogs   kind = "read-dirty-logs"
	kindClearLogs  kind = "clear-dirty-logs"
	kindRefillLogs kind = "refill-dirty-logs"
	kindStopLogs   kind = "stop-dirty-logs"
)

// FindMemorySlots finds the numbers of slots whose ranges are known, and switches on their dirty logs. [Report.Slots] has those that were found.
// elsewhere is the address of a page in the process that is no guest memory.
//
// Numbers cannot be read, and are found by trying. First those that are in use: on a number in use, a slot whose memory is elsewhere is
// refused (EINVAL); on a free one, a slot whose range another has is (EEXIST). Then each range on each of these numbers: a slot that is not
// exactly the one asked for is refused, and nothing changed. No call can make a slot, unless the memory in the middle of the largest range is
// no guest memory at all; the slot is deleted at once then, and the operation fails.
func FindMemorySlots(vm RemoteFile, ranges []MemorySlot, elsewhere uint64) Operation {
	return Operation{Kind: kindFindSlots, File: vm, Slots: ranges, Address: elsewhere}
}

// ReadDirtyLogs stores the dirty log of each slot at its Bitmap, and changes nothing. It fails where a slot is not what it was, or has no log:
// a [CallError] with ENOENT for a log that QEMU has switched off. The memory behind each bitmap has to be large enough for any slot's, down
// to the end of the last bitmap.
func ReadDirtyLogs(vm RemoteFile, slots []MemorySlot) Operation {
	return Operation{Kind: kindReadLogs, File: vm, Slots: slots}
}

// ClearDirtyLogs takes out of each slot's log what is set at its Bitmap, and has KVM look out for the next write to those pages.
func ClearDirtyLogs(vm RemoteFile, slots []MemorySlot) Operation {
	return Operation{Kind: kindClearLogs, File: vm, Slots: slots}
}

// RefillDirtyLogs makes every page dirty in each slot's log, by switching it off and on.
func RefillDirtyLogs(vm RemoteFile, slots []MemorySlot) Operation {
	return Operation{Kind: kindRefillLogs, File: vm, Slots: slots}
}

// StopDirtyLogs switches the logs off.
func StopDirtyLogs(vm RemoteFile, slots []MemorySlot) Operation {
	return Operation{Kind: kindStopLogs, File: vm, Slots: slots}
}

// Requests and flags of include/uapi/linux/kvm.h.
const (
	ioctlSetUserMemoryRegion = 0x4020ae46 // _IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)
	ioctlGetDirtyLog         = 0x4010ae42 // _IOW(KVMIO, 0x42, struct kvm_dirty_log)
	ioctlClearDirtyLog       = 0xc018aec0 // _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)

	memLogDirtyPages = 1 // KVM_MEM_LOG_DIRTY_PAGES
)

// runKVM executes an operation on a virtual machine.
func (t *tracee) runKVM(op Operation, pid int) ([]MemorySlot, error) {
	if err := op.File.Check(pid); err != nil {
		return nil, err
	}
	vm := op.File.FD
	if op.Kind == kindFindSlots {
		return t.findSlots(vm, op.Slots, op.Address)
	}
	for _, s := range op.Slots {
		var err error
		switch op.Kind {
		case kindReadLogs:
			// First the log, which shows that there is a slot with one: setting it to what it has to be can then only be refused, or
			// change nothing.
			if err = t.getLog(vm, s); err == nil {
				err = t.setSlot(vm, s, memLogDirtyPages)
			}
		case kindClearLogs:
			err = t.clearLog(vm, s, s.Bytes/slotPageBytes)
		case kindRefillLogs:
			if err = t.clearLog(vm, s, 0); err == nil {
				if err = t.setSlot(vm, s, 0); err == nil {
					err = t.setSlot(vm, s, memLogDirtyPages)
				}
			}
		case kindStopLogs:
			// Without a log there is nothing to be done.
			if err = t.clearLog(vm, s, 0); err == nil {
				err = t.setSlot(vm, s, 0)
			} else if errors.Is(err, unix.ENOENT) {
				err = nil
			}
		}
		if err != nil {
			return nil, fmt.Errorf("memory slot %#x at gpa %#x: %w", s.ID, s.GPA, err)
		}
	}
	return nil, nil
}

// QEMU gives each new slot the lowest number that is free, so that few are free between those in use (accel/kvm/kvm-all.c, kvm_get_free_slot).
const (
	freeInARow = 8
	mostSlots  = 512
)

// findSlots finds the slots with these ranges.
func (t *tracee) findSlots(vm int, ranges []MemorySlot, elsewhere uint64) ([]MemorySlot, error) {
	var spaces []uint32
	for _, r := range ranges {
		if !slices.Contains(spaces, r.Space()) {
			spaces = append(spaces, r.Space())
		}
	}
	var found []MemorySlot
	for _, space := range spaces {
		within := slices.DeleteFunc(slices.Clone(ranges), func(r MemorySlot) bool { return r.Space() != space })
		used, err := t.usedSlots(vm, space, within, elsewhere)
		if err != nil {
			return nil, err
		}
		for _, r := range within {
			for i, id := range used {
				r.ID = id
				err := t.setSlot(vm, r, memLogDirtyPages)
				if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EEXIST) {
					continue
				}
				if err != nil {
					return nil, err
				}
				found = append(found, r)
				used = slices.Delete(used, i, i+1)
				break
			}
		}
	}
	return found, nil
}

// usedSlots returns the numbers of an address space that are in use.
func (t *tracee) usedSlots(vm int, space uint32, ranges []MemorySlot, elsewhere uint64) ([]uint32, error) {
	largest := slices.MaxFunc(ranges, func(a, b MemorySlot) int {
		if a.Bytes < b.Bytes {
			return -1
		}
		return 1
	})
	probe := MemorySlot{GPA: largest.GPA + largest.Bytes/2&^(slotPageBytes-1), Bytes: slotPageBytes, HVA: elsewhere}
	var used []uint32
	for id, free := uint32(0), 0; id < mostSlots && free < freeInARow; id++ {
		probe.ID = space<<spaceShift | id
		switch err := t.setSlot(vm, probe, 0); {
		case errors.Is(err, unix.EINVAL):
			used = append(used, probe.ID)
			free = 0
		case errors.Is(err, unix.EEXIST):
			free++
		case err == nil: // made, as nothing is mapped there
			probe.Bytes = 0
			return nil, errors.Join(fmt.Errorf("no guest memory at gpa %#x", probe.GPA), t.setSlot(vm, probe, 0))
		default:
			return nil, err
		}
	}
	return used, nil
}

// setSlot sets a slot: struct kvm_userspace_memory_region.
func (t *tracee) setSlot(vm int, s MemorySlot, flags uint32) error {
	return t.ioctl("KVM_SET_USER_MEMORY_REGION", vm, ioctlSetUserMemoryRegion,
		uint64(s.ID)|uint64(flags)<<32, s.GPA, s.Bytes, s.HVA)
}

// getLog reads a log: struct kvm_dirty_log.
func (t *tracee) getLog(vm int, s MemorySlot) error {
	return t.ioctl("KVM_GET_DIRTY_LOG", vm, ioctlGetDirtyLog, uint64(s.ID), s.Bitmap)
}

// clearLog clears the log of a slot's first pages: struct kvm_clear_dirty_log. Of no pages, it tells whether there is a log.
func (t *tracee) clearLog(vm int, s MemorySlot, pages uint64) error {
	return t.ioctl("KVM_CLEAR_DIRTY_LOG", vm, ioctlClearDirtyLog, uint64(s.ID)|pages<<32, 0, s.Bitmap)
}

// ioctl makes a call with a struct of these words, little-endian as all of these machines are.
func (t *tracee) ioctl(name string, fd int, request uint64, words ...uint64) error {
	text := func(uint64) []byte {
		var b []byte
		for _, w := range words {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		return b
	}
	_, err := t.withScratch(text, func(address uint64) error {
		_, err := t.call(name, unix.SYS_IOCTL, uint64(fd), request, address)
		return err
	})
	return err
}

// openSharedMemory makes a memory file and maps it.
func (t *tracee) openSharedMemory(name string, bytes uint64) (fd int, address uint64, err error) {
	if fd, err = t.openMemfd(name); err != nil {
		return 0, 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close(fd))
		}
	}()
	if _, err = t.call("ftruncate", unix.SYS_FTRUNCATE, uint64(fd), bytes); err != nil {
		return 0, 0, err
	}
	if !t.atEntry {
		if err = t.toEntry(); err != nil {
			return 0, 0, err
		}
	}
	// The offset is the sixth argument, which is not ours to change. It is zero already: threads that are not to be cancelled at any
	// instruction have nothing else there.
	if offset := t.entry.sixth(); offset != 0 {
		return 0, 0, fmt.Errorf("%w: mmap at the offset %#x, which its ppoll has in that register", ErrUnsupported, offset)
	}
	address, err = t.call("mmap", unix.SYS_MMAP, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED, uint64(fd))
	return fd, address, err
}

// unmap unmaps a file's memory where it still is mapped.
func (t *tracee) unmap(pid int, file RemoteFile, address, bytes uint64) error {
	if !file.MappedAt(pid, address, bytes) {
		return nil
	}
	_, err := t.call("munmap", unix.SYS_MUNMAP, address, bytes)
	return err
}

// MappedAt says whether the process has the file mapped there, all of it shared and from its beginning on.
func (f RemoteFile) MappedAt(pid int, address, bytes uint64) bool {
	mappings, err := pagetable.MapsWithin(pid, []pagetable.Range{{Start: address, End: address + bytes}})
	if err != nil || len(mappings) != 1 {
		return false
	}
	m := mappings[0]
	device := unix.Mkdev(m.DeviceMajor, m.DeviceMinor)
	return m.Start == address && m.End == address+bytes && m.Shared && m.Inode == f.Inode && device == f.Device && m.Offset == 0
}
