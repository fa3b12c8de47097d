package machine

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a process that the harness started, or had started, and must not outlive the test.
type process struct {
	pid    int
	pidfd  int           // a signal sent by it reaches this process and never another of the same number
	exited chan struct{} // closed when it has ended
	end    error         // how it ended, if that is known: valid after exited is closed
}

// startChild starts cmd and leaves a goroutine behind that waits for its end. The child gets a session of its own, so that
// an interrupt typed at the test does not reach it. The kernel kills it when the thread that started it ends: that
// goroutine keeps the thread.
func startChild(cmd *exec.Cmd) (*process, error) {
	p := &process{exited: make(chan struct{}), pidfd: -1}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: &p.pidfd}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			p.end = cmd.Wait()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("run %s: %w", cmd.Path, err)
	}
	return p, nil
}

// adopt watches a process that is not our child.
func adopt(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	p := &process{pid: pid, pidfd: fd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if err != unix.EINTR {
				return
			}
		}
	}()
	return p, nil
}

// kill kills the process and waits for its end.
func (p *process) kill() error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	if err := unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	<-p.exited
	return nil
}

// pollInterval is how often what a process makes is looked at while waiting.
const pollInterval = 5 * time.Millisecond

// pollAgain waits a moment. It fails when the process has ended, or the context.
func (p *process) pollAgain(ctx context.Context) error {
	select {
	case <-p.exited:
		return fmt.Errorf("process %d ended: %v", p.pid, p.end)
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollInterval):
		return nil
	}
}
