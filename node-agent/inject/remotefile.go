package inject

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// RemoteFile is an open file of another process, with what is needed to know it again: descriptor numbers are used
// anew. It can be kept in a record; inode numbers of anonymous files are not used twice until the next boot (but for a
// wrap of 32 bits).
type RemoteFile struct {
	FD     int    `json:"fd"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Link   string `json:"link"` // what /proc/PID/fd/FD points to, "anon_inode:[userfaultfd]"
}

// Identify describes the file that is open as fd in process pid; fs.ErrNotExist where there is none.
func Identify(pid, fd int) (RemoteFile, error) {
	path := fmt.Sprintf("/proc/%d/fd/%d", pid, fd)
	link, err := os.Readlink(path)
	if err != nil {
		return RemoteFile{}, fmt.Errorf("identify descriptor %d of process %d: %w", fd, pid, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return RemoteFile{}, fmt.Errorf("identify descriptor %d of process %d: %w", fd, pid, err)
	}
	return RemoteFile{FD: fd, Device: uint64(st.Dev), Inode: st.Ino, Link: link}, nil
}

// Check fails with [ErrIdentity] unless the file still is open in process pid under its number.
func (f RemoteFile) Check(pid int) error {
	now, err := Identify(pid, f.FD)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: descriptor %d of process %d (%s) is closed", ErrIdentity, f.FD, pid, f.Link)
	case err != nil:
		return err
	case now != f:
		return fmt.Errorf("%w: descriptor %d of process %d was %s inode %d, and is %s inode %d",
			ErrIdentity, f.FD, pid, f.Link, f.Inode, now.Link, now.Inode)
	}
	return nil
}

// Duplicate returns a descriptor of our own for the same open file. [ErrIdentity] where the number belongs to another
// file by now; the check is made on the duplicate, so nothing can change in between.
func (f RemoteFile) Duplicate(pid int) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("duplicate descriptor %d (%s) of process %d: %w", f.FD, f.Link, pid, err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = fmt.Errorf("%w: %w", ErrGone, err)
		}
		return fail(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, f.FD, 0)
	if err != nil {
		if errors.Is(err, unix.EBADF) {
			err = fmt.Errorf("%w: %w", ErrIdentity, err)
		}
		return fail(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return fail(err)
	}
	if uint64(st.Dev) != f.Device || st.Ino != f.Inode {
		unix.Close(fd)
		return fail(ErrIdentity)
	}
	return os.NewFile(uintptr(fd), f.Link), nil
}

// OpenForWriting duplicates the regular files and block devices that process pid has open for writing; the caller closes them. One that is
// closed meanwhile is left out.
func OpenForWriting(pid int) ([]*os.File, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, fmt.Errorf("list the open files of process %d: %w", pid, err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	var files []*os.File
	for _, e := range entries {
		remote, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, remote, 0)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		kind := uint32(0)
		if err == nil && flags&unix.O_PATH == 0 && flags&unix.O_ACCMODE != unix.O_RDONLY && unix.Fstat(fd, &st) == nil {
			kind = st.Mode & unix.S_IFMT
		}
		if kind != unix.S_IFREG && kind != unix.S_IFBLK {
			unix.Close(fd)
			continue
		}
		files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d of process %d", remote, pid)))
	}
	return files, nil
}
