package image

import (
	"errors"
	"sync"
	"syscall"
)

// faultyDisk is a disk that fails on purpose.
type faultyDisk struct {
	disk
	noLinks bool

	mu    sync.Mutex
	calls int   // made so far, of those that can fail
	fail  int   // number of the call that fails, and every one after it; 0: none
	err   error // with what
	free_ int64 // answered by free, where not 0
}

func (d *faultyDisk) step() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	if d.fail > 0 && d.calls >= d.fail {
		return d.err
	}
	return nil
}

func (d *faultyDisk) create(name string) (diskFile, error) {
	if err := d.step(); err != nil {
		return nil, err
	}
	f, err := d.disk.create(name)
	if err != nil {
		return nil, err
	}
	return &faultyFile{f, d}, nil
}

func (d *faultyDisk) link(old, new string) error {
	if d.noLinks {
		return syscall.EPERM
	}
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.link(old, new)
}

func (d *faultyDisk) rename(old, new string) error {
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.rename(old, new)
}

func (d *faultyDisk) remove(name string) error {
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.remove(name)
}

func (d *faultyDisk) syncDir(name string) error {
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.syncDir(name)
}

// hookedDisk calls a function before a directory is synced, and before a file is synced or closed.
type hookedDisk struct {
	disk
	sync  func(name string) error
	file  func(name string) error // may be nil
	close func(name string) error // may be nil
}

func (d *hookedDisk) create(name string) (diskFile, error) {
	f, err := d.disk.create(name)
	if err != nil {
		return nil, err
	}
	return &hookedFile{f, d, name}, nil
}

// hookedFile is a file of a hookedDisk.
type hookedFile struct {
	diskFile
	disk *hookedDisk
	name string
}

func (f *hookedFile) Sync() error {
	if f.disk.file != nil {
		if err := f.disk.file(f.name); err != nil {
			return err
		}
	}
	return f.diskFile.Sync()
}

func (f *hookedFile) Close() error {
	err := f.diskFile.Close()
	if f.disk.close != nil {
		err = errors.Join(err, f.disk.close(f.name))
	}
	return err
}

func (d *hookedDisk) syncDir(name string) error {
	if err := d.sync(name); err != nil {
		return err
	}
	return d.disk.syncDir(name)
}

func (d *faultyDisk) free() (int64, error) {
	if d.free_ != 0 {
		return d.free_, nil
	}
	return d.disk.free()
}

// faultyFile writes half of what it is given when it fails.
type faultyFile struct {
	diskFile
	disk *faultyDisk
}

func (f *faultyFile) WriteAt(p []byte, offset int64) (int, error) {
	if err := f.disk.step(); err != nil {
		n, _ := f.diskFile.WriteAt(p[:len(p)/2], offset)
		return n, err
	}
	return f.diskFile.WriteAt(p, offset)
}

func (f *faultyFile) Truncate(size int64) error {
	if err := f.disk.step(); err != nil {
		return err
	}
	return f.diskFile.Truncate(size)
}

func (f *faultyFile) Sync() error {
	if err := f.disk.step(); err != nil {
		return err
	}
	return f.diskFile.Sync()
}
