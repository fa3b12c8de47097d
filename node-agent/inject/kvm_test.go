package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	guests "github.com/vmckpt/vmckpt/test/machine"
)

// kvmMachine is a QEMU under KVM with what is needed to reach its dirty log.
type kvmMachine struct {
	*guests.Machine
	t      *testing.T
	vm     RemoteFile
	thread int
	shared RemoteFile
	ranges []MemorySlot
	from   uint64 // where the shared memory is in the process
}

func startKVM(t *testing.T, version guests.Version, args ...string) *kvmMachine {
	t.Helper()
	needRoot(t)
	m := &kvmMachine{t: t, Machine: guests.Start(t, guests.Options{
		QEMU: version, Accel: guests.KVM, MemoryBytes: 64 * guests.MiB, Args: args,
		Guest: guests.Writer{Percent: 50, Parameters: writer.Parameters{PagesPerPass: 64, Spin: 100_000}},
	})}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var fd int
		fmt.Sscan(e.Name(), &fd)
		if f, err := Identify(m.PID, fd); err == nil && f.Link == "anon_inode:kvm-vm" {
			m.vm = f
		}
	}
	if m.thread, err = MonitorThread(m.PID); err != nil {
		t.Fatal(err)
	}
	process, err := qemu.Find(t.Context(), qemu.Selector{PID: m.PID})
	if err != nil {
		t.Fatal(err)
	}
	layout, err := qemu.ReadLayout(t.Context(), m.Monitor, process)
	if err != nil {
		t.Fatal(err)
	}
	ranges, err := qemu.GuestRanges(t.Context(), m.Monitor, layout)
	if err != nil || len(ranges) == 0 {
		t.Fatalf("ranges %v: %v", ranges, err)
	}
	report, err := Do(shortly(t), m.PID, Program{OpenSharedMemory("log", 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	m.shared, m.from = report.Files[0], report.Addresses[0]
	for i, r := range ranges {
		slot := MemorySlot{GPA: r.GPA, Bytes: r.Bytes, HVA: layout[r.Block].HVA + r.OffsetBytes, Bitmap: m.from + uint64(i)*64<<10}
		m.ranges = append(m.ranges, slot.InSpace(r.Space))
	}
	return m
}

// mustWrite fails the test unless QEMU answers and its guest writes on.
func (m *kvmMachine) mustWrite() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 20*time.Second)
	defer cancel()
	if state, err := qemu.Status(ctx, m.Monitor); err != nil || state != qemu.StateRunning {
		m.t.Fatalf("state %q: %v", state, err)
	}
	before, _, err := m.WriterStatus(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > before.Passes && s.Errors == 0 }); err != nil {
		m.t.Fatal(err)
	}
}

// dirtyPages counts what a log says.
func (m *kvmMachine) dirtyPages(s MemorySlot) (n int) {
	f, err := m.shared.Duplicate(m.PID)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	bitmap := make([]byte, (s.Bytes/slotPageBytes+63)/64*8)
	if _, err := f.ReadAt(bitmap, int64(s.Bitmap-m.from)); err != nil {
		m.t.Fatal(err)
	}
	for page := range s.Bytes / slotPageBytes {
		n += int(bitmap[page/8] >> (page % 8) & 1)
	}
	return n
}

func forEachKVM(t *testing.T, f func(t *testing.T, m *kvmMachine)) {
	for _, v := range []guests.Version{guests.V72, guests.V10} {
		for name, args := range map[string][]string{"named": {"-name", "debug-threads=on"}, "nameless": {"-name", "debug-threads=off"}} {
			t.Run(string(v)+"-"+name, func(t *testing.T) { f(t, startKVM(t, v, args...)) })
		}
	}
}

// TestDirtyLog reads and clears the log of a running machine. Nothing of its memory map changes meanwhile, so that it need not be held.
func TestDirtyLog(t *testing.T) {
	forEachKVM(t, func(t *testing.T, m *kvmMachine) {
		h, err := StartResident(shortly(t), m.PID, m.thread)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		find := func() []MemorySlot {
			report, err := h.Do(shortly(t), Program{FindMemorySlots(m.vm, m.ranges, m.from)})
			if err != nil {
				t.Fatal(err)
			}
			return report.Slots
		}
		slots := find()
		if len(slots) != len(m.ranges) {
			t.Fatalf("found %+v of %+v", slots, m.ranges)
		}
		again := find() // changes nothing
		for i := range slots {
			if again[i] != slots[i] {
				t.Errorf("found %+v, and then %+v", slots[i], again[i])
			}
		}
		m.mustWrite()
		if _, err := h.Do(shortly(t), Program{ReadDirtyLogs(m.vm, slots)}); err != nil {
			t.Fatal(err)
		}
		for _, s := range slots {
			if n := m.dirtyPages(s); n != int(s.Bytes/slotPageBytes) {
				t.Errorf("a new log has %d pages of slot %+v", n, s)
			}
		}
		report, err := h.Do(shortly(t), Program{ClearDirtyLogs(m.vm, slots), ReadDirtyLogs(m.vm, slots)})
		if err != nil {
			t.Fatal(err)
		}
		written, all := 0, 0
		for _, s := range slots {
			written, all = written+m.dirtyPages(s), all+int(s.Bytes/slotPageBytes)
		}
		m.mustWrite()
		if _, err := h.Do(shortly(t), Program{ReadDirtyLogs(m.vm, slots)}); err != nil {
			t.Fatal(err)
		}
		later := 0
		for _, s := range slots {
			later += m.dirtyPages(s)
		}
		t.Logf("%d slots; of %d pages %d dirty right after clearing (in a stop of %v), %d later", len(slots), all, written, report.Stop, later)
		if later <= written || later == all {
			t.Errorf("of %d pages %d were dirty, and %d later", all, written, later)
		}
		if _, err := h.Do(shortly(t), Program{RefillDirtyLogs(m.vm, slots), ReadDirtyLogs(m.vm, slots)}); err != nil {
			t.Fatal(err)
		}
		if n := m.dirtyPages(slots[0]); n != int(slots[0].Bytes/slotPageBytes) {
			t.Errorf("made dirty, the log has %d pages of %d", n, slots[0].Bytes/slotPageBytes)
		}
		wrong := slots[0]
		wrong.Bytes -= slotPageBytes
		if _, err := h.Do(shortly(t), Program{ReadDirtyLogs(m.vm, []MemorySlot{wrong})}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("a slot of another size: %v", err)
		}
		if _, err := h.Do(shortly(t), Program{StopDirtyLogs(m.vm, slots)}); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Do(shortly(t), Program{ReadDirtyLogs(m.vm, slots)}); !errors.Is(err, unix.ENOENT) {
			t.Errorf("switched off: %v", err)
		}
		undo := Program{Unmap(m.shared, m.from, 1<<20), Close(m.shared)}
		if _, err := Do(shortly(t), m.PID, undo); err != nil {
			t.Fatal(err)
		}
		if m.shared.MappedAt(m.PID, m.from, 1<<20) {
			t.Error("still mapped")
		}
		m.mustWrite()
	})
}

// TestDirtyLogHelperDiesAnywhere kills the helper at every step of all that is done in the monitor's thread, and of what is done for it in the
// main thread.
func TestDirtyLogHelperDiesAnywhere(t *testing.T) {
	for _, v := range []guests.Version{guests.V72, guests.V10} {
		t.Run(string(v), func(t *testing.T) {
			m := startKVM(t, v)
			h, err := StartResident(shortly(t), m.PID, m.thread)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			report, err := h.Do(shortly(t), Program{FindMemorySlots(m.vm, m.ranges, m.from)})
			if err != nil {
				t.Fatal(err)
			}
			slots := report.Slots
			for _, c := range []struct {
				tid     int
				program Program
			}{
				{m.thread, Program{FindMemorySlots(m.vm, m.ranges[:1], m.from)}},
				{m.thread, Program{ReadDirtyLogs(m.vm, slots[:1]), ClearDirtyLogs(m.vm, slots[:1])}},
				{m.thread, Program{RefillDirtyLogs(m.vm, slots[:1])}},
				{m.thread, Program{StopDirtyLogs(m.vm, slots[:1])}},
				{m.PID, Program{OpenSharedMemory("another", 1<<16)}},
			} {
				answer, err := runHelper(shortly(t), request{PID: m.PID, TID: c.tid, Program: c.program})
				if err != nil {
					t.Fatalf("%v: %v", c.program, err)
				}
				for at, name := range answer.Steps {
					for _, pause := range []time.Duration{0, 2 * time.Millisecond} {
						_, err := runHelper(shortly(t), request{PID: m.PID, TID: c.tid, Program: c.program, DieAt: at + 1, Pause: pause})
						// A log that a killed helper has left switched off is no fault of the next.
						if err != nil && !errors.Is(err, ErrHelper) && !errors.Is(err, unix.ENOENT) {
							t.Fatalf("%v killed at step %d, %s: %v", c.program, at+1, name, err)
						}
						m.mustWrite()
					}
				}
				t.Logf("%v: %d steps", c.program, len(answer.Steps))
				if _, err := h.Do(shortly(t), Program{FindMemorySlots(m.vm, m.ranges, m.from)}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestMonitorThreadIsNotGuessed asks for the thread of a process that has none.
func TestMonitorThreadIsNotGuessed(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	if tid, err := MonitorThread(c.pid()); !errors.Is(err, ErrBusy) {
		t.Errorf("found %d: %v", tid, err)
	}
}
