package image

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errFileSystem is how file systems say that their own structures are damaged (EFSCORRUPTED in the kernel); EBADMSG says that a
// checksum of theirs does not match (EFSBADCRC).
const errFileSystem = unix.EUCLEAN

// openRegularFor is openRegular for reading ([os.O_RDONLY]), or for writing as well ([os.O_RDWR]).
//
// Opening alone can do things: a device node that the volume's owner made may be the node's watchdog. So the file is first held
// without being opened (O_PATH), looked at, and then opened by what is held: by no name that could lead elsewhere meanwhile.
func openRegularFor(root *os.Root, name string, access int) (*os.File, os.FileInfo, error) {
	held, err := root.OpenFile(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, err
	}
	defer held.Close()
	info, err := held.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, &irregularError{name: name, want: "regular file", mode: info.Mode()}
	}
	f, err := openHeld(held, access)
	if err != nil {
		return nil, nil, err
	}
	if info, err = f.Stat(); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// openHeld opens the regular file that an O_PATH descriptor holds (proc_pid_fd(5)). It does not wait, not even for a lease on it
// to be given up.
func openHeld(held *os.File, access int) (*os.File, error) {
	path := fmt.Sprintf("/proc/self/fd/%d", held.Fd())
	for {
		fd, err := unix.Open(path, access|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), held.Name()), nil
		case errors.Is(err, unix.ENOENT):
			// It is not the file that is missing, and nobody is to take it for that.
			return nil, fmt.Errorf("open %s: no /proc to open it by (%v)", held.Name(), err)
		case !errors.Is(err, unix.EINTR):
			return nil, &os.PathError{Op: "open", Path: held.Name(), Err: err}
		}
	}
}
