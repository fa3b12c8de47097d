//go:build !linux

package image

import (
	"fmt"
	"os"
	"syscall"
)

// errFileSystem has no word of its own here.
const errFileSystem = syscall.EIO

// openRegularFor is openRegular for reading ([os.O_RDONLY]), or for writing as well ([os.O_RDWR]). What is exchanged for the file
// between two calls may be opened here, though never waited for, nor used.
func openRegularFor(root *os.Root, name string, access int) (*os.File, os.FileInfo, error) {
	before, err := root.Lstat(name)
	if err != nil {
		return nil, nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, nil, &irregularError{name: name, want: "regular file", mode: before.Mode()}
	}
	f, err := root.OpenFile(name, access|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !os.SameFile(before, info) {
		err = fmt.Errorf("%s was exchanged while it was opened", name)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}
