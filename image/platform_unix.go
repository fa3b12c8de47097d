//go:build linux || darwin

package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// freeBytes returns how much this user can still write to the file system that f lies on.
func freeBytes(f *os.File) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return 0, fmt.Errorf("free space: %w", err)
	}
	return int64(s.Bavail) * int64(s.Bsize), nil
}

// allocatedBytes returns how much of the volume goes free when a file is removed: nothing, where it has another name as well.
func allocatedBytes(info os.FileInfo) int64 {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok || s.Nlink > 1 {
		return 0
	}
	return int64(s.Blocks) * 512 // whatever the file system's own blocks are (stat(2))
}

// unreadable reports whether err is the system's word for a bad sector or a file system that has found itself damaged.
func unreadable(err error) bool {
	for _, e := range []error{unix.EIO, errFileSystem, unix.EBADMSG} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// lockPoll is how often a lock is asked for again: flock cannot be waited for and given up.
const lockPoll = 10 * time.Millisecond

// lock takes a lock on an open file, waiting for it. It goes with the file: close it to let go.
func lock(ctx context.Context, f *os.File, exclusive bool) error {
	for {
		ok, err := tryLock(f, exclusive)
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// tryLock takes the lock if it is free. An exclusive one needs a file that was opened for writing too: NFS makes record locks
// of flock's, and those want that. It is refused here everywhere, so that it is not on somebody's NFS that it first shows.
func tryLock(f *os.File, exclusive bool) (bool, error) {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err == nil && flags&unix.O_ACCMODE != unix.O_RDWR {
			err = unix.EBADF
		}
		if err != nil {
			return false, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}
