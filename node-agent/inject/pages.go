package inject

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Operations on memory of the process. The kernel walks the page tables of all of it and holds the address space for writing meanwhile (measured:
// 2 ms for 16 MiB of small pages), so large ranges belong into several programs.

const (
	kindLock       kind = "lock-on-fault"
	kindUnlock     kind = "unlock"
	kindMerge      kind = "merge"
	kindDoNotMerge kind = "do-not-merge"
)

// LockOnFault keeps what is populated in memory, and populates nothing. What counts here is its side effect: locked memory cannot be given back
// by MADV_DONTNEED. The process's limit on locked memory has to allow it.
func LockOnFault(address, bytes uint64) Operation {
	return Operation{Kind: kindLock, Address: address, Bytes: bytes}
}

// Unlock undoes LockOnFault.
func Unlock(address, bytes uint64) Operation {
	return Operation{Kind: kindUnlock, Address: address, Bytes: bytes}
}

// Mergeable says whether KSM may merge pages of private memory; those that are merged are taken apart where it may not.
func Mergeable(address, bytes uint64, may bool) Operation {
	k := kindDoNotMerge
	if may {
		k = kindMerge
	}
	return Operation{Kind: k, Address: address, Bytes: bytes}
}

// runPages executes an operation on memory.
func (t *tracee) runPages(op Operation) error {
	var err error
	switch op.Kind {
	case kindLock:
		_, err = t.call("mlock2", unix.SYS_MLOCK2, op.Address, op.Bytes, unix.MLOCK_ONFAULT)
	case kindUnlock:
		_, err = t.call("munlock", unix.SYS_MUNLOCK, op.Address, op.Bytes)
	case kindMerge:
		_, err = t.call("madvise", unix.SYS_MADVISE, op.Address, op.Bytes, unix.MADV_MERGEABLE)
	case kindDoNotMerge:
		_, err = t.call("madvise", unix.SYS_MADVISE, op.Address, op.Bytes, unix.MADV_UNMERGEABLE)
	}
	if err != nil {
		return fmt.Errorf("memory [%#x,%#x): %w", op.Address, op.Address+op.Bytes, err)
	}
	return nil
}
