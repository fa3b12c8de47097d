package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// disk is all that a writer does to the repository's file system. There is one of it, and a test's that fails on purpose.
// Names are relative to the repository and never leave it.
type disk interface {
	create(name string) (diskFile, error) // a new file, for writing
	link(old, new string) error
	rename(old, new string) error
	remove(name string) error
	removeAll(name string) error // a whole directory, if it is there
	syncDir(name string) error
	free() (int64, error) // bytes that this user can still write
}

type diskFile interface {
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	Close() error
	Stat() (os.FileInfo, error)
	// written hints that the bytes may go to the device now, so that the Sync at the end finds little to do.
	written(offset, length int64)
}

// rootDisk is the disk beneath a directory.
type rootDisk struct{ root *os.Root }

func (d rootDisk) create(name string) (diskFile, error) {
	f, err := d.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return rootFile{f}, nil
}

func (d rootDisk) link(old, new string) error   { return d.root.Link(old, new) }
func (d rootDisk) rename(old, new string) error { return d.root.Rename(old, new) }
func (d rootDisk) remove(name string) error     { return d.root.Remove(name) }
func (d rootDisk) removeAll(name string) error  { return d.root.RemoveAll(name) }

func (d rootDisk) syncDir(name string) error {
	f, err := openListing(d.root, name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (d rootDisk) free() (int64, error) {
	f, err := openListing(d.root, ".")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return freeBytes(f)
}

type rootFile struct{ *os.File }

func (f rootFile) written(offset, length int64) { startWriteback(f.File, offset, length) }

// openRegular opens a file beneath root for reading, and only if it is a regular file under its own name: a link, a pipe
// or a device that the volume's owner put in its place is refused ([*irregularError]) before it is opened.
func openRegular(root *os.Root, name string) (*os.File, os.FileInfo, error) {
	return openRegularFor(root, name, os.O_RDONLY)
}

// irregularError says that something else stands where a file or a directory has to be.
type irregularError struct {
	name string
	want string
	mode fs.FileMode // of what stands there
}

func (e *irregularError) Error() string {
	return fmt.Sprintf("%s is no %s (%v)", e.name, e.want, e.mode.Type())
}

// irregular reports whether err is an [*irregularError].
func irregular(err error) bool {
	typed := new(irregularError)
	return errors.As(err, &typed)
}

// readSmall reads a whole file of at most limit bytes.
func readSmall(root *os.Root, name string, limit int64) ([]byte, error) {
	f, info, err := openRegular(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info.Size() > limit {
		return nil, &sizeError{name: name, size: info.Size(), limit: limit}
	}
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(content)) > limit {
		return nil, &sizeError{name: name, size: int64(len(content)), limit: limit}
	}
	return content, nil
}

// sizeError says that a file is larger than one of its kind can be.
type sizeError struct {
	name        string
	size, limit int64
}

func (e *sizeError) Error() string {
	return fmt.Sprintf("%s has %d bytes, more than the %d that it can have", e.name, e.size, e.limit)
}

// openDir opens a directory beneath root that is one itself, not a link to one.
func openDir(root *os.Root, name string) (*os.Root, error) {
	before, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !before.IsDir() {
		return nil, &irregularError{name: name, want: "directory", mode: before.Mode()}
	}
	dir, err := root.OpenRoot(name + "/.") // a pipe that has come in its place meanwhile has none, and is not waited for
	if err != nil {
		return nil, err
	}
	info, err := dir.Stat(".")
	if err == nil && !os.SameFile(before, info) {
		err = fmt.Errorf("%s was exchanged while it was opened", name)
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// openTop opens the directory that all others are beneath. As long as dir is one, links in its path are followed.
func openTop(dir string) (*os.Root, error) {
	if dir == "" {
		return nil, errors.New("no directory is named")
	}
	return os.OpenRoot(dir + "/.") // see openDir
}

// openListing opens a directory beneath root as a file: to be listed, or synced.
func openListing(root *os.Root, name string) (*os.File, error) {
	dir, err := openDir(root, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Open(".")
}

// entriesLimit bounds how many names are read of one directory of a repository.
const entriesLimit = 1 << 16

// names returns what is in a directory.
func names(root *os.Root, dir string) ([]string, error) {
	f, err := openListing(root, dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	list, err := f.Readdirnames(entriesLimit)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(list) == entriesLimit {
		return nil, fmt.Errorf("%s has more than %d entries", dir, entriesLimit)
	}
	return list, nil
}

// gone makes an error of removing something that is gone already none.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
