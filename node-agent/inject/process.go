package inject

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// preflight reports why calls could not be injected into a thread of process pid, as far as that can be known without stopping it.
// It does not ask whether the thread is in ppoll, which changes by the millisecond.
func preflight(pid, tid int) error {
	if err := checkArchitecture(pid); err != nil {
		return err
	}
	status, err := readStatus(tid)
	if err != nil {
		return err
	}
	if err := status.injectable(); err != nil {
		return err
	}
	if _, err := readCall(pid, tid); err != nil { // asks for the very right that PTRACE_SEIZE asks for
		return fmt.Errorf("no right to trace it: %w", err)
	}
	if status.seccomp {
		return maySuspendSeccomp()
	}
	return nil
}

// status is what /proc/PID/status says of a thread, proc_pid_status(5).
type status struct {
	state     byte // R, S, D, T (stopped), t (stopped by a tracer), Z, X
	tracer    int
	seccomp   bool // a filter is on
	effective uint64
}

func (s status) injectable() error {
	switch {
	case s.state == 'Z' || s.state == 'X':
		return ErrGone
	case s.tracer != 0:
		return fmt.Errorf("%w by process %d", ErrTraced, s.tracer)
	case s.state == 'T':
		return ErrStopped
	}
	return nil
}

func readStatus(pid int) (status, error) {
	return readStatusFile(fmt.Sprintf("/proc/%d/status", pid))
}

func readStatusFile(path string) (status, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return status{}, gone(err)
	}
	var s status
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		var err error
		switch {
		case name == "State" && value != "":
			s.state = value[0]
		case name == "TracerPid":
			s.tracer, err = strconv.Atoi(value)
		case name == "Seccomp":
			s.seccomp = value != "0"
		case name == "CapEff":
			s.effective, err = strconv.ParseUint(value, 16, 64)
		}
		if err != nil {
			return status{}, fmt.Errorf("read %s: %s: %w", path, name, err)
		}
	}
	return s, nil
}

// maySuspendSeccomp asks what the kernel asks for PTRACE_O_SUSPEND_SECCOMP (kernel/ptrace.c, check_ptrace_options):
// CAP_SYS_ADMIN, and no filter on the one who asks.
func maySuspendSeccomp() error {
	own, err := readStatusFile("/proc/thread-self/status")
	if err != nil {
		return err
	}
	switch {
	case own.seccomp:
		return fmt.Errorf("%w: this process is under a filter itself", ErrSeccomp)
	case own.effective&(1<<unix.CAP_SYS_ADMIN) == 0:
		return fmt.Errorf("%w: CAP_SYS_ADMIN is missing", ErrSeccomp)
	}
	return nil
}

// startTime returns when process pid was started, in clock ticks since boot: field 22 of /proc/PID/stat, proc_pid_stat(5).
func startTime(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, gone(err)
	}
	// The second field is the name in parentheses and may hold anything, parentheses and blanks too.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	const inRest = 22 - 3 // fields counts from the third on
	if len(fields) <= inRest {
		return 0, fmt.Errorf("read %s: %d fields only", path, len(fields)+2)
	}
	return strconv.ParseUint(fields[inRest], 10, 64)
}

// whereabouts is what a thread is doing, by /proc/PID/syscall.
type whereabouts int

const (
	running   whereabouts = iota // or between two calls
	parked                       // sleeping in ppoll
	elsewhere                    // sleeping in another call
)

// readSyscall looks what a thread of process pid is doing, without disturbing it. polls says that a poll is as good as a ppoll.
func readSyscall(pid, tid int, polls bool) (whereabouts, error) {
	call, err := readCall(pid, tid)
	if err != nil {
		return running, err
	}
	switch {
	case call == nil:
		return running, nil
	case call.number == unix.SYS_PPOLL, polls && call.parked(pid):
		return parked, nil
	}
	return elsewhere, nil
}

// sleepingCall is the system call that a thread sleeps in.
type sleepingCall struct {
	number      uint64
	arguments   [6]uint64
	instruction uint64 // behind the one that made the call
}

// readCall reads /proc/PID/task/TID/syscall, proc_pid_syscall(5). It returns nil for a thread that is awake, or asleep outside of a call.
func readCall(pid, tid int) (*sleepingCall, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/syscall", pid, tid))
	if err != nil {
		return nil, gone(err)
	}
	fields := strings.Fields(string(text))
	if len(fields) == 0 || fields[0] == "running" || fields[0] == "-1" {
		return nil, nil
	}
	words := make([]uint64, 9) // number, six arguments, stack pointer, instruction pointer
	for i := range words {
		if i == len(fields) {
			return nil, fmt.Errorf("read what thread %d is doing: %q", tid, text)
		}
		if words[i], err = strconv.ParseUint(fields[i], 0, 64); err != nil {
			return nil, fmt.Errorf("read what thread %d is doing: %w", tid, err)
		}
	}
	return &sleepingCall{number: words[0], arguments: [6]uint64(words[1:7]), instruction: words[8]}, nil
}

// parked says whether the call is one that a thread can be taken in.
func (c *sleepingCall) parked(pid int) bool {
	var origin [originBytes]byte
	if _, ok := park(c.number, nil); !ok { // its code decides, if anything
		if peek(pid, c.instruction-uint64(len(origin)), origin[:]) != nil {
			return false
		}
	}
	_, ok := park(c.number, origin[:])
	return ok
}

// gone turns "there is no such file" of /proc into ErrGone.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// checkArchitecture makes sure that process pid is of our own architecture: a 32-bit program enters the kernel by other
// numbers and instructions.
func checkArchitecture(pid int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return gone(err)
	}
	defer f.Close()
	var header [20]byte // up to e_machine of struct elf64_hdr, include/uapi/linux/elf.h; both machines are little-endian
	if _, err := f.ReadAt(header[:], 0); err != nil {
		return err
	}
	const class64 = 2 // ELFCLASS64
	machine := uint16(header[18]) | uint16(header[19])<<8
	if string(header[:4]) != "\x7fELF" || header[4] != class64 || machine != elfMachine {
		return fmt.Errorf("%w: its program is of another architecture (ELF class %d, machine %d)", ErrUnsupported, header[4], machine)
	}
	return nil
}
