package pagetable

import (
	"fmt"
	"os"
	"sync"
	"unsafe"
)

// Entry is one 64-bit entry of /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst.
type Entry uint64

const (
	entrySoftDirty      Entry = 1 << 55
	entryExclusive      Entry = 1 << 56
	entryWriteProtected Entry = 1 << 57
	entryGuard          Entry = 1 << 58
	entryFileOrShared   Entry = 1 << 61
	entrySwapped        Entry = 1 << 62
	entryPresent        Entry = 1 << 63
	entryPFN            Entry = 1<<55 - 1
)

func (e Entry) Present() bool        { return e&entryPresent != 0 }
func (e Entry) Swapped() bool        { return e&entrySwapped != 0 }        // also a protected hole, see FeatureWPUnpopulated
func (e Entry) FileOrShared() bool   { return e&entryFileOrShared != 0 }   // file page, or shared anonymous memory
func (e Entry) Exclusive() bool      { return e&entryExclusive != 0 }      // mapped by this process alone
func (e Entry) WriteProtected() bool { return e&entryWriteProtected != 0 } // by userfaultfd
func (e Entry) SoftDirty() bool      { return e&entrySoftDirty != 0 }      // written since clear_refs
func (e Entry) Guard() bool          { return e&entryGuard != 0 }          // MADV_GUARD_INSTALL, Linux 6.15

// PFN returns the page frame number of a present page; 0 to readers without CAP_SYS_ADMIN.
func (e Entry) PFN() uint64 {
	if !e.Present() {
		return 0
	}
	return uint64(e & entryPFN)
}

// Pagemap is the open pagemap of one process. Its methods may be called by several goroutines at once.
// It stays with the process it was opened on: after an exec or exit reads come back empty, never from another process.
type Pagemap struct {
	pid     int
	file    *os.File
	regions sync.Pool // of *[regionsAtOnce]region
}

// OpenPagemap opens the page tables of process pid, for reading and for the protecting scan. It needs the right to trace
// the process.
func OpenPagemap(pid int) (*Pagemap, error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/pagemap", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open page tables of process %d: %w", pid, err)
	}
	return &Pagemap{pid: pid, file: f}, nil
}

// Close closes it; protection and registrations stay.
func (p *Pagemap) Close() error { return p.file.Close() }

const (
	entryBytes    = 8
	entriesAtOnce = 8192 // entries a read: 32 MiB of 4 KiB pages, a 64 KiB buffer
)

// Entries calls visit with the entries of [start, end) in order, in pieces: entries[0] is that of the page at address
// at. The slice is used again after visit returns. It stops at the first error of visit.
func (p *Pagemap) Entries(start, end uint64, visit func(at uint64, entries []Entry) error) error {
	pageBytes := uint64(os.Getpagesize())
	if start%pageBytes != 0 || end%pageBytes != 0 || end < start {
		return fmt.Errorf("read page tables of process %d: [%#x,%#x) is not a range of whole pages", p.pid, start, end)
	}
	entries := make([]Entry, min(entriesAtOnce, (end-start)/pageBytes))
	raw := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(entries))), len(entries)*entryBytes)
	for at := start; at < end; {
		n := min(entriesAtOnce, (end-at)/pageBytes)
		got, err := p.file.ReadAt(raw[:n*entryBytes], int64(at/pageBytes*entryBytes))
		whole := got / entryBytes
		if whole == 0 {
			return fmt.Errorf("read page tables of process %d at %#x: %w", p.pid, at, err)
		}
		if err := visit(at, entries[:whole]); err != nil {
			return err
		}
		at += uint64(whole) * pageBytes
	}
	return nil
}
