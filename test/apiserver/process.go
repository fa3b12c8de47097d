package apiserver

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// thread runs functions on one thread of the operating system, which lives until the channel is closed. What they start
// with a [leash] lives no longer than that.
type thread chan func()

func startThread() thread {
	work := make(thread)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		for f := range work {
			f()
		}
	}()
	return work
}

func (t thread) do(f func() error) error {
	done := make(chan error, 1)
	t <- func() { done <- f() }
	return <-done
}

// killTimeout is how long a killed program may take to be gone. It has gigabytes at most to give back.
const killTimeout = 30 * time.Second

// kill kills the program whose process id is in the file at pidPath, and waits until it is gone: its ports are free then.
// A program that has not been started, or is gone already, is no error.
func kill(pidPath string) error {
	text, err := os.ReadFile(pidPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return fmt.Errorf("process id in %s: %w", pidPath, err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return os.Remove(pidPath)
	} else if err != nil {
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	// One that ended by itself has been waited for, and its id may be another's by now.
	if ours, err := isChild(pid); err != nil {
		return err
	} else if !ours {
		return os.Remove(pidPath)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	deadline := time.Now().Add(killTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("process %d is still there %v after it was killed", pid, killTimeout)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", pid, err)
		}
		if n > 0 {
			return os.Remove(pidPath)
		}
	}
}

// isChild tells whether a process is a child of this one.
func isChild(pid int) (bool, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", os.Getpid())), nil
}
