package machine

import (
	"bufio"
	"fmt"
	"os"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
)

// makeDisk writes a disk image in which each sector has the content that its number says (workload.Sector), so that the
// guest can check what it reads.
func makeDisk(path string, bytes uint64) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("make the test disk: %w", err)
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	sector := make([]byte, workload.SectorBytes)
	for n := range bytes / workload.SectorBytes {
		workload.Sector(sector, n)
		if _, err := w.Write(sector); err != nil {
			return fmt.Errorf("make the test disk: %w", err)
		}
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("make the test disk: %w", err)
	}
	return f.Close()
}
