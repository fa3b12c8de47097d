package guard

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// keeperVariable marks a process as the keeper of a guard; its value is the guarded process's id and the bound on a guest's write in
// nanoseconds, see [Main].
const keeperVariable = "VMCKPT_GUARD_PID_AND_BOUND_NANOSECONDS"

// keeperName is its whole command line, for people who look at processes.
const keeperName = "vmckpt-guard"

// Descriptors that the worker leaves to the keeper.
const (
	keeperControlFD = 3 // SOCK_SEQPACKET, see cowprotocol.go
	keeperUffdFD    = 4 // the synchronous userfaultfd, non-blocking
	keeperRingFD    = 5 // shared memory of ringMemoryBytes
	keeperBellFD    = 6 // an eventfd that is rung when there are pages in the ring
)

const (
	// stepBytes is how much is protected or let go in one system call. The guest's faults in the process, and ours, wait for it: 84 µs at
	// the most (measured, small pages).
	stepBytes = 2 << 20

	// unregisterBytes is how much is taken out of the userfaultfd in one. The kernel holds the process's address space for writing meanwhile.
	unregisterBytes = 64 << 20
)

// area is memory that is registered.
type area struct {
	Range

	// released are the pages that may have been written since the instant: they were copied and let go. A fault in one is an old one, of a
	// second thread for example, and its page must not be copied again.
	released *pageset.Set
}

// keeper answers the faults of a guarded process. One thread does it all, in steps that are short enough for a guest to wait for.
type keeper struct {
	uffd    pagetable.Userfaultfd
	memory  *pagetable.Memory
	ring    ring
	timer   inject.KillTimer
	bound   time.Duration // on a guest's write
	areas   []area        // ascending
	copying bool          // the instant is over: pages are copied before they are let go
	copied  uint64        // pages put into the ring
	faults  uint64        // answered
	buffer  pagetable.FaultBuffer
}

// errDrop says that the guard has to be given up, and is the reason.
type errDrop dropReason

func (e errDrop) Error() string { return fmt.Sprintf("the guard is given up (%#x)", uint64(e)) }

// keep is the keeper's life.
func keep(value string) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	first()
	k, err := newKeeper(value)
	if err == nil {
		err = sendOrder(keeperControlFD, answerDone, 0)
	}
	if err != nil {
		giveUp(err)
		return err
	}
	err = k.run()
	if err != nil {
		giveUp(err)
	}
	// The kernel would do it all at our end, in one go, in which no page fault of the process's comes through.
	ending := k.end()
	if err == nil && ending == nil {
		return sendOrder(keeperControlFD, answerDone, k.faults)
	}
	if drop := errDrop(0); errors.As(err, &drop) {
		err = nil // the worker knows
	}
	return errors.Join(err, ending)
}

// first puts this thread first in line for a processor: while it waits for one, so does a guest's write. It works for microseconds at a time.
// Where a container may not have that, it goes as far first as it may.
func first() {
	// The call takes a pointer to struct sched_param, include/uapi/linux/sched/types.h: one number.
	priority := int32(1)
	if _, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_RR, uintptr(unsafe.Pointer(&priority))); errno != 0 {
		unix.Setpriority(unix.PRIO_PROCESS, 0, -20) //nolint:errcheck // it does as well as it can
	}
}

// giveUp tells the worker why there is no guard any more. Whoever does not hear it sees the end.
func giveUp(err error) {
	reason := uint64(dropError)
	var drop errDrop
	var errno unix.Errno
	if errors.As(err, &drop) {
		reason = uint64(drop)
	} else if errors.As(err, &errno) {
		reason |= uint64(errno) << 8
	}
	sendOrder(keeperControlFD, answerDropped, reason) //nolint:errcheck // see above
}

// newKeeper sets a keeper up; nothing is protected yet.
func newKeeper(value string) (*keeper, error) {
	guarded, limit, _ := strings.Cut(value, ",")
	pid, err1 := strconv.Atoi(guarded)
	bound, err2 := strconv.ParseInt(limit, 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	k := &keeper{bound: time.Duration(bound)}
	// The poller of the runtime is for files that do not block when they are wrapped: this one is not to be its.
	k.uffd = pagetable.Userfaultfd{File: os.NewFile(keeperUffdFD, "userfaultfd")}
	if err := unix.SetNonblock(keeperUffdFD, true); err != nil {
		return nil, fmt.Errorf("make the userfaultfd non-blocking: %w", err)
	}
	memory, err := unix.Mmap(keeperRingFD, 0, ringMemoryBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	k.ring = ringIn(memory)
	if k.memory, err = pagetable.OpenMemory(pid); err != nil {
		return nil, err
	}
	if k.timer, err = inject.NewKillTimer(); err != nil {
		return nil, err
	}
	if err := k.register(); err != nil {
		return nil, err
	}
	if err := lockMemory(); err != nil {
		return nil, err
	}
	if err := unix.Mlock(memory); err != nil {
		return nil, fmt.Errorf("lock the ring: %w", err)
	}
	return k, nil
}

// register registers the areas that the worker's first packet names.
func (k *keeper) register() error {
	o, numbers, err := receiveOrder(keeperControlFD, make([]byte, orderBytes), nil)
	if err != nil {
		return err
	}
	if o != orderRegister {
		return fmt.Errorf("the worker began with %q", rune(o))
	}
	for a := range slices.Chunk(numbers, 2) {
		k.areas = append(k.areas, area{Range{a[0], a[1]}, pageset.New((a[1] - a[0]) / pageset.PageBytes)})
	}
	slices.SortFunc(k.areas, func(a, b area) int { return cmp.Compare(a.Start, b.Start) })
	for _, a := range k.areas {
		if err := k.uffd.Register(a.Start, a.Bytes(), pagetable.ModeWriteProtect); err != nil {
			return err
		}
	}
	return nil
}

// run obeys the worker and answers faults, until it is told to end.
func (k *keeper) run() error {
	buf, numbers := make([]byte, orderBytes), make([]uint64, 0, 2*rangesAtOnce)
	for {
		if err := k.serve(); err != nil {
			return err
		}
		fds := []unix.PollFd{{Fd: keeperUffdFD, Events: unix.POLLIN}, {Fd: keeperControlFD, Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, max(1, int(k.bound.Milliseconds()/4))); err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for faults: %w", err)
		}
		if fds[1].Revents == 0 {
			continue
		}
		o, numbers, err := receiveOrder(keeperControlFD, buf, numbers)
		if err != nil {
			return err
		}
		switch o {
		case orderProtect:
			err = k.change(numbers, true)
		case orderTaken:
			k.markReleased(numbers)
			if err := k.change(numbers, false); err != nil {
				return err
			}
			continue
		case orderInstant:
			k.copying = true
		case orderFlush: // a page is put into the ring before it is let go
		case orderEnd:
			return nil
		default:
			err = fmt.Errorf("the worker sent %q", rune(o))
		}
		if err == nil {
			err = sendOrder(keeperControlFD, answerDone, k.faults)
		}
		if err != nil {
			return err
		}
	}
}

// change protects ranges, or lets them go, and answers faults in between.
func (k *keeper) change(numbers []uint64, protect bool) error {
	for r := range slices.Chunk(numbers, 2) {
		for at := r[0]; at < r[1]; {
			next := min(at&^(stepBytes-1)+stepBytes, r[1])
			if err := k.uffd.WriteProtect(at, next-at, protect); err != nil {
				return err
			}
			if err := k.serve(); err != nil {
				return err
			}
			at = next
		}
	}
	return nil
}

// markReleased notes what is let go, before it is.
func (k *keeper) markReleased(numbers []uint64) {
	if !k.copying {
		return
	}
	for r := range slices.Chunk(numbers, 2) {
		for at := r[0]; at < r[1]; {
			a := k.find(at)
			if a == nil {
				break
			}
			end := min(r[1], a.End)
			a.released.Add(pageset.Run{First: (at - a.Start) / pageset.PageBytes, Count: (end - at) / pageset.PageBytes})
			at = end
		}
	}
}

// find returns the area that an address lies in.
func (k *keeper) find(address uint64) *area {
	i, found := slices.BinarySearchFunc(k.areas, address, func(a area, address uint64) int {
		switch {
		case a.End <= address:
			return -1
		case a.Start > address:
			return 1
		}
		return 0
	})
	if !found {
		return nil
	}
	return &k.areas[i]
}

// servedAtOnce is how many rounds of faults are answered before there is a look at what the worker wants: they may never end.
const servedAtOnce = 4

// serve answers the faults that are there now. It is where the watchdog is set back: whoever waits for an answer gets one, or the watchdog's.
func (k *keeper) serve() error {
	before := k.copied
	for range servedAtOnce {
		if err := k.timer.Set(k.bound); err != nil {
			return err
		}
		faults, err := k.uffd.Faults(&k.buffer)
		if err != nil {
			return err
		}
		if len(faults) == 0 {
			break
		}
		for i, f := range faults {
			if err := k.answer(f.Address); err != nil {
				// They were read, and show nowhere any more: who waits in them is let go before all that follows.
				k.copying = false
				for _, f := range faults[i:] {
					k.answer(f.Address) //nolint:errcheck // the guard is given up anyway
				}
				return err
			}
		}
	}
	if k.copied != before {
		k.ringBell()
	}
	return nil
}

// answer lets a page go, and copies it first where the instant is over and it was not yet.
func (k *keeper) answer(address uint64) error {
	k.faults++
	a := k.find(address)
	if a == nil {
		return fmt.Errorf("a fault at %#x, which is not guarded: %w", address, unix.EFAULT)
	}
	page := (address - a.Start) / pageset.PageBytes
	if k.copying && !a.released.Has(page) {
		if err := k.copy(address); err != nil {
			return err
		}
		a.released.Add(pageset.Run{First: page, Count: 1})
	}
	return k.uffd.WriteProtect(address, pageset.PageBytes, false)
}

// copy puts a page into the ring. Where there is no room it waits, as the guest's write does.
func (k *keeper) copy(address uint64) error {
	slot := k.ring.room()
	if slot == nil {
		k.ringBell()
		for until := time.Now().Add(k.bound * 3 / 4); slot == nil; slot = k.ring.room() {
			if time.Now().After(until) {
				return errDrop(dropFull)
			}
			time.Sleep(20 * time.Microsecond)
		}
		if err := k.timer.Set(k.bound); err != nil {
			return err
		}
	}
	if err := k.memory.Read(slot, address); err != nil {
		return err
	}
	k.ring.put(address)
	k.copied++
	return nil
}

// ringBell wakes the worker. It cannot fail in a way that matters: a bell that is full has been rung.
func (k *keeper) ringBell() {
	unix.Write(keeperBellFD, []byte{1, 0, 0, 0, 0, 0, 0, 0}) //nolint:errcheck // see above
}

// end lets everything go, in steps.
func (k *keeper) end() error {
	k.copying = false
	for _, a := range k.areas {
		if err := k.change([]uint64{a.Start, a.End}, false); err != nil {
			return err
		}
		for at := a.Start; at < a.End; at += unregisterBytes {
			if err := k.uffd.Unregister(at, min(unregisterBytes, a.End-at)); err != nil {
				return err
			}
			if err := k.serve(); err != nil {
				return err
			}
		}
	}
	return k.timer.Set(0)
}
