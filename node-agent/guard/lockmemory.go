package guard

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// lockMemory keeps the program in memory, so that the guest never waits for a page of it to come from a disk.
//
// What is in memory stays there, and what comes of a file, the program's own code above all, is brought in now. The rest, which the Go
// runtime has mapped and never touched (some 80 MiB), is left out: it comes from no disk, and populating it takes longer
// (50 ms) than all else that a holder does before it is armed. While it holds it next to never touches memory for the first time.
func lockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("lock the holder's memory: %w", err)
	}
	mappings, err := pagetable.Maps(os.Getpid())
	if err != nil {
		return err
	}
	for _, m := range mappings {
		if m.Inode == 0 || !m.Read || strings.HasPrefix(m.Path, "/memfd:") {
			continue
		}
		if err := m.LockOwn(); err != nil {
			return fmt.Errorf("lock the holder's memory: %w", err)
		}
	}
	return nil
}
