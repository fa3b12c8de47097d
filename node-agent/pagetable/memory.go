package pagetable

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Memory reads and writes the memory of one process. Its methods may be used by several goroutines at once.
type Memory struct {
	pid int
	mem *os.File
}

// Segment is a range of addresses.
type Segment struct {
	Address uint64
	Bytes   uint64
}

// segmentsAtOnce is how many segments one process_vm_readv takes: UIO_MAXIOV, include/uapi/linux/uio.h.
const segmentsAtOnce = 1024

// OpenMemory opens the memory of process pid for reading and writing. It needs the right to trace the process.
//
// Reads go by pid: the caller makes sure that the process is still the one meant (writes stay with the process opened).
func OpenMemory(pid int) (*Memory, error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open memory of process %d: %w", pid, err)
	}
	return &Memory{pid: pid, mem: f}, nil
}

// Close closes it.
func (m *Memory) Close() error { return m.mem.Close() }

// Read fills dst with the memory at address. Pages never populated read as zeros (in private memory the zero page is mapped
// by that). A [*FaultError] names the first address that could not be read.
func (m *Memory) Read(dst []byte, address uint64) error {
	return m.ReadScatter(dst, []Segment{{Address: address, Bytes: uint64(len(dst))}})
}

// ReadScatter fills dst with the segments one after the other; together they are exactly len(dst) bytes. Many short segments
// cost a fifth of the throughput of runs of a megabyte and more.
func (m *Memory) ReadScatter(dst []byte, segments []Segment) error {
	return m.transfer(dst, segments, false)
}

// WriteScatter puts src into the segments one after the other; together they are exactly len(src) bytes. Like any store of
// the process itself it is subject to the mapping's protection and seen by dirty tracking.
func (m *Memory) WriteScatter(src []byte, segments []Segment) error {
	return m.transfer(src, segments, true)
}

// Write puts src at address through /proc/PID/mem, which goes past the protection of private mappings: read-only ROM can be
// written.
func (m *Memory) Write(src []byte, address uint64) error {
	n, err := m.mem.WriteAt(src, int64(address))
	if err != nil {
		// The kernel answers EIO, and os.File wraps it with the path; what counts is where.
		return &FaultError{PID: m.pid, Address: address + uint64(n), Write: true, Err: errors.Unwrap(err)}
	}
	return nil
}

// transfer moves the segments in calls of at most segmentsAtOnce, taking up after a short transfer where it ended: only a
// call that moves nothing at all has met the address at fault.
func (m *Memory) transfer(local []byte, segments []Segment, write bool) error {
	var total uint64
	for _, s := range segments {
		total += s.Bytes
	}
	if total != uint64(len(local)) {
		return fmt.Errorf("transfer memory of process %d: segments of %d bytes, a buffer of %d", m.pid, total, len(local))
	}
	call := unix.ProcessVMReadv
	if write {
		call = unix.ProcessVMWritev
	}
	remote := make([]unix.RemoteIovec, 0, min(len(segments), segmentsAtOnce))
	var within uint64 // bytes of segments[0] already moved
	for len(local) > 0 {
		remote = remote[:0]
		skip := within
		for _, s := range segments[:min(len(segments), segmentsAtOnce)] {
			remote = append(remote, unix.RemoteIovec{Base: uintptr(s.Address + skip), Len: int(s.Bytes - skip)})
			skip = 0
		}
		n, err := call(m.pid, []unix.Iovec{{Base: &local[0], Len: uint64(len(local))}}, remote, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			for segments[0].Bytes == within { // an empty segment is not what failed
				segments, within = segments[1:], 0
			}
			if err == nil {
				err = unix.EFAULT
			}
			return &FaultError{PID: m.pid, Address: segments[0].Address + within, Write: write, Err: err}
		}
		local = local[n:]
		within += uint64(n)
		for len(segments) > 0 && within >= segments[0].Bytes {
			within -= segments[0].Bytes
			segments = segments[1:]
		}
	}
	return nil
}
