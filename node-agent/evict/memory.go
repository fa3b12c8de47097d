package evict

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// Backing says what a range of memory is made of, as far as it decides what a missing page means.
type Backing int

const (
	// Anonymous is private memory without a file: what is neither present nor swapped reads as zeros.
	Anonymous Backing = iota
	// SharedMemory is shared memory on tmpfs (memfd, /dev/shm, shared anonymous): a page that no page table maps can
	// still have content. Holes of the file read as zeros.
	SharedMemory
	// SharedHuge is shared memory on hugetlbfs, which does not tell its holes: all of it counts as populated.
	SharedHuge
	// Other is all else: private mappings of files, files on disk. All of it counts as populated.
	Other
)

// String names the backing for people.
func (b Backing) String() string {
	switch b {
	case Anonymous:
		return "private anonymous memory"
	case SharedMemory:
		return "shared memory"
	case SharedHuge:
		return "shared huge pages"
	}
	return "memory of another kind"
}

// ErrUnmapped: part of the range is not mapped in the process.
var ErrUnmapped = errors.New("not mapped")

// Memory is a range of a process's addresses with what backs it.
type Memory struct {
	Start, End uint64 // addresses, page aligned
	Backing    Backing

	file       *os.File // SharedMemory only
	fileOffset uint64   // of Start
}

// Resolve learns what backs the addresses [start, end) of a process. mappings are those of the process, ascending
// (smaps and maps will both do). The caller closes the result.
func Resolve(pid int, mappings []pagetable.Mapping, start, end uint64) (*Memory, error) {
	parts, err := Cover(mappings, start, end)
	if err != nil {
		return nil, err
	}
	m := &Memory{Start: start, End: end}
	first := parts[0]
	for _, p := range parts {
		if p.Shared != first.Shared || p.Inode != first.Inode || p.DeviceMajor != first.DeviceMajor || p.DeviceMinor != first.DeviceMinor ||
			(p.Inode != 0 && p.Offset-p.Start != first.Offset-first.Start) {
			m.Backing = Other // pieced together from several: no promise holds for the whole
			return m, nil
		}
	}
	switch {
	case !first.Shared && first.Inode == 0:
		m.Backing = Anonymous
		return m, nil
	case !first.Shared:
		m.Backing = Other
		return m, nil
	}
	// map_files leads to the very file that is mapped, whatever has become of its name. Opening it needs CAP_SYS_ADMIN or
	// CAP_CHECKPOINT_RESTORE.
	name := fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, first.Start, first.End)
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		m.Backing = Other // a device: opening it could have effects of its own
		return m, nil
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrPermission) {
		// Sealed or unreadable: nothing to be learned of its holes.
		m.Backing = Other
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the file behind [%#x,%#x) of process %d: %w", start, end, pid, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("file system behind [%#x,%#x) of process %d: %w", start, end, pid, err)
	}
	switch st.Type {
	case unix.TMPFS_MAGIC:
		m.Backing, m.file, m.fileOffset = SharedMemory, f, first.Offset+(start-first.Start)
		return m, nil
	case unix.HUGETLBFS_MAGIC:
		m.Backing = SharedHuge
	default:
		m.Backing = Other
	}
	return m, f.Close()
}

// Close closes the file behind the memory, where one is open.
func (m *Memory) Close() error {
	if m.file == nil {
		return nil
	}
	return m.file.Close()
}

// Pages returns how many pages the range has.
func (m *Memory) Pages() uint64 { return (m.End - m.Start) / pageset.PageBytes }

// Cover returns the mappings that [start, end) lies in, in ascending order, or [ErrUnmapped] naming the first address
// that lies in none. The kernel's scans pass over addresses that are not mapped without a word, so whoever relies on
// a scan has to ask this as well.
func Cover(mappings []pagetable.Mapping, start, end uint64) ([]pagetable.Mapping, error) {
	var parts []pagetable.Mapping
	at := start
	for _, m := range mappings {
		if m.End <= at || at >= end {
			continue
		}
		if m.Start > at {
			break
		}
		parts = append(parts, m)
		at = m.End
	}
	if at < end || len(parts) == 0 {
		return nil, fmt.Errorf("address %#x of [%#x,%#x): %w", at, start, end, ErrUnmapped)
	}
	return parts, nil
}
