package inject

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How a child waits in its ppoll; any of them with "+seccomp".
const (
	childForever = "forever" // no timeout
	childTicks   = "ticks"   // a timeout of 2 ms, over and over
	childSlow    = "slow"    // a timeout of slowTick
	childSpins   = "spins"   // a timeout of zero: never asleep
	childSleeps  = "sleeps"  // not in ppoll at all
	childMasked  = "masked"  // SIGUSR1 blocked but for the ppoll
)

const slowTick = 100 * time.Millisecond

// tally is what a child has seen of its ppoll since it began.
type tally struct {
	Returns     int      // whatever the result
	Interrupted int      // EINTR
	Odd         []string // results that no ppoll may have: a foreign error, ready descriptors without events
	Descriptors []string // the links of its open files
}

// childMain waits for bytes on its standard input in ppoll on the main thread, which it is called on, and answers each with its tally.
func childMain(mode string) {
	debug.SetGCPercent(-1) // else the runtime would shrink the stack
	growStack()            // the scratch memory has to lie on this goroutine's stack, as it would on a C stack
	mode, filtered := strings.CutSuffix(mode, "+seccomp")
	var mask *unix.Sigset_t
	if mode == childMasked {
		mask = maskOutsidePpoll(unix.SIGUSR1)
	}
	if filtered {
		forbidByFilter(unix.SYS_USERFAULTFD, unix.SYS_MEMFD_CREATE)
	}
	timeout := map[string]time.Duration{childTicks: 2 * time.Millisecond, childSpins: 0, childSlow: slowTick}
	var seen tally
	fmt.Println("ready")
	if mode == childSleeps {
		_ = unix.Nanosleep(&unix.Timespec{Sec: 1000}, nil)
	}
	for {
		fds := []unix.PollFd{{Fd: 0, Events: unix.POLLIN}}
		var ts *unix.Timespec
		if d, ok := timeout[mode]; ok {
			v := unix.NsecToTimespec(int64(d))
			ts = &v
		}
		n, err := ppoll(fds, ts, mask)
		seen.Returns++
		switch {
		case err == unix.EINTR:
			seen.Interrupted++
			continue
		case err != nil:
			seen.Odd = append(seen.Odd, err.Error())
			continue
		case n > 0 && fds[0].Revents == 0:
			seen.Odd = append(seen.Odd, fmt.Sprintf("%d ready, no events", n))
			continue
		case n == 0:
			continue
		}
		var b [1]byte
		if got, _ := unix.Read(0, b[:]); got == 0 {
			os.Exit(0)
		}
		seen.Descriptors = nil
		entries, _ := os.ReadDir("/proc/self/fd")
		for _, e := range entries {
			if link, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
				seen.Descriptors = append(seen.Descriptors, link)
			}
		}
		_ = json.NewEncoder(os.Stdout).Encode(seen)
	}
}

// ppoll passes the size of the mask (_NSIG/8 bytes), which [unix.Ppoll] does not.
func ppoll(fds []unix.PollFd, timeout *unix.Timespec, mask *unix.Sigset_t) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)),
		uintptr(unsafe.Pointer(timeout)), uintptr(unsafe.Pointer(mask)), 8, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

//go:noinline
func growStack() {
	var big [256 << 10]byte
	runtime.KeepAlive(&big)
}

// maskOutsidePpoll blocks a signal in this thread, lets it have a handler, and returns the mask for ppoll, without it.
func maskOutsidePpoll(s unix.Signal) *unix.Sigset_t {
	inside := &unix.Sigset_t{}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, nil, inside); err != nil {
		panic(err)
	}
	one := &unix.Sigset_t{}
	one.Val[0] = 1 << (s - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, one, nil); err != nil {
		panic(err)
	}
	return inside // the runtime's own handler is installed for every signal
}

// forbidByFilter kills this process when it makes one of the calls: what a filter does at worst.
func forbidByFilter(calls ...uint32) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // struct seccomp_data begins with the number
	for _, nr := range calls {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: nr},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_KILL_PROCESS})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		panic(errno)
	}
}

// child is such a process, seen from the test.
type child struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(t testing.TB, mode string) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childMark + "=" + mode, "GODEBUG=asyncpreemptoff=1"}
	cmd.Stderr = os.Stderr
	if os.Geteuid() == 0 { // as QEMU is: another user, without privileges
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := c.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("child said %q: %v", line, err)
	}
	return c
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// ask has the child go through its loop once, by which it shows that it lives.
func (c *child) ask() tally {
	c.t.Helper()
	if _, err := c.in.Write([]byte{1}); err != nil {
		c.t.Fatalf("child is gone: %v", err)
	}
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		c.t.Fatalf("child is gone: %v", err)
	}
	var seen tally
	if err := json.Unmarshal(line, &seen); err != nil {
		c.t.Fatal(err)
	}
	return seen
}
