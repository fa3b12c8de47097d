package dirty

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// BusyError says that another process has the session of a QEMU process: one capture a VM at a time.
type BusyError struct {
	Process Process
	Holder  int // pid of who has it; 0 where that is not known
}

func (e *BusyError) Error() string {
	if e.Holder == 0 {
		return fmt.Sprintf("capture session of %v is in use by another process", e.Process)
	}
	return fmt.Sprintf("capture session of %v is in use by process %d", e.Process, e.Holder)
}

// Is makes every BusyError an [ErrBusy].
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// ErrBusy is what every [BusyError] is.
var ErrBusy = errors.New("capture session is in use")

// Somebody who looks ([Busy]) has the lock for a moment: it is tried again so often, after so long.
const (
	lockTries = 4
	lockWait  = 2 * time.Millisecond
)

// Busy returns a [*BusyError] where another process has a process's session. It is a look, by which nobody owns anything: the session may be
// taken or let go the moment after.
func Busy(recordDir string, p Process) error {
	dir, err := os.OpenRoot(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record directory: %w", err)
	}
	defer dir.Close()
	f, err := dir.OpenFile(lockName(p), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the lock of the capture session of %v: %w", p, err)
	}
	defer f.Close()                                          // lets go of it as well
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) // two who look are not in each other's way
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &BusyError{Process: p, Holder: readHolder(f)}
	}
	return err
}

// lockSession takes the lock of a process's session: a lock on a file, which the kernel lets go when its holder dies,
// however. The file stays when the lock is let go; [Sweep] takes it away once the process is gone.
func lockSession(dir *os.Root, p Process) (*os.File, error) {
	f, err := dir.OpenFile(lockName(p), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock capture session of %v: %w", p, err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for try := 1; errors.Is(err, unix.EWOULDBLOCK) && try < lockTries; try++ {
		time.Sleep(lockWait)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		busy := &BusyError{Process: p, Holder: readHolder(f)}
		f.Close()
		return nil, busy
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("lock capture session of %v: %w", p, err)
	}
	// For people only: the lock is the kernel's, the pid in the file may be older than it.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock capture session of %v: %w", p, err)
	}
	return f, nil
}

// Lock keeps everybody else from a process's session until it is closed, without opening the session. It fails with [ErrBusy] where another
// process has it.
func Lock(recordDir string, p Process) (io.Closer, error) {
	dir, lock, err := openRecordDir(recordDir, p)
	if err != nil {
		return nil, err
	}
	return lock, dir.Close()
}

func readHolder(f *os.File) int {
	text, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}
