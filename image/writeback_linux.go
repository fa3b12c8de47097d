package image

import (
	"os"

	"golang.org/x/sys/unix"
)

// startWriteback begins writing a range of f to its device and does not wait for it. It is a hint: errors show in Sync.
func startWriteback(f *os.File, offset, length int64) {
	unix.SyncFileRange(int(f.Fd()), offset, length, unix.SYNC_FILE_RANGE_WRITE)
}
