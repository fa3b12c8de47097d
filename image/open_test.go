//go:build linux

package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// opened returns a function that says whether the file at path, wherever it is moved, was opened since the last call.
func opened(t *testing.T, path string) func() bool {
	t.Helper()
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(watch) })
	if _, err := unix.InotifyAddWatch(watch, path, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		n, err := unix.Read(watch, make([]byte, 1<<16))
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		return n > 0
	}
}

// TestLockIsNoDevice: what stands in place of the lock is not as much as opened. A pipe tells of that; a device would have done
// whatever it does.
func TestLockIsNoDevice(t *testing.T) {
	r := newRepository(t, testKeys(false))
	path := filepath.Join(r.path, lockName)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	was := opened(t, path)
	if _, err := r.Sweep(context.Background(), 0); !irregular(err) {
		t.Errorf("a pipe for a lock: %v", err)
	}
	if was() {
		t.Error("it was opened")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sweep(context.Background(), 0); err != nil {
		t.Errorf("no lock there: %v", err)
	}
}

// TestExchangedWhileOpened has a file, or a directory, and a pipe change places all the time: the pipe is never opened.
func TestExchangedWhileOpened(t *testing.T) {
	for name, open := range map[string]func(root *os.Root) error{
		"file": func(root *os.Root) error {
			f, _, err := openRegular(root, "file")
			if err == nil {
				f.Close()
			}
			return err
		},
		"directory": func(root *os.Root) error {
			dir, err := openDir(root, "directory")
			if err == nil {
				dir.Close()
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			at := t.TempDir()
			path, other := filepath.Join(at, name), filepath.Join(at, "other")
			err := os.WriteFile(path, nil, 0o600)
			if name == "directory" {
				err = errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
			}
			if err := errors.Join(err, syscall.Mkfifo(other, 0o600)); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(at)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			was := opened(t, other)
			var stop atomic.Bool
			ended := make(chan error, 1)
			go func() {
				for !stop.Load() {
					if err := unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, other, unix.RENAME_EXCHANGE); err != nil {
						ended <- err
						return
					}
				}
				ended <- nil
			}()
			good, refused := 0, 0
			began := time.Now()
			for d := time.Duration(0); d < 300*time.Millisecond || (good == 0 || refused == 0) && d < 10*time.Second; d = time.Since(began) {
				err := open(root)
				switch {
				case err == nil:
					good++
				case errors.Is(err, fs.ErrNotExist):
					t.Error(err) // something is there at any time
				default:
					refused++
				}
			}
			stop.Store(true)
			if err := <-ended; err != nil {
				t.Skip("two files cannot change places here:", err)
			}
			if was() {
				t.Error("the pipe was opened")
			}
			if good == 0 || refused == 0 {
				t.Errorf("opened %d times, refused %d times", good, refused)
			}
		})
	}
}
