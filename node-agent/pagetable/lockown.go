package pagetable

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// LockOwn keeps a mapping of this very process in memory (mlock(2)): what of it is not there yet is brought in, and all of it stays.
func (m Mapping) LockOwn() error {
	// Not x/sys's Mlock: it wants a slice, and the runtime's checks of pointers none of memory that it has not made.
	if _, _, errno := unix.Syscall(unix.SYS_MLOCK, uintptr(m.Start), uintptr(m.Bytes()), 0); errno != 0 {
		return fmt.Errorf("lock %s at %#x to %#x in memory: %w", m.Path, m.Start, m.End, errno)
	}
	return nil
}
