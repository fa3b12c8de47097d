package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errMissed: the thread did not reach a ppoll in as many stops as it was followed.
var errMissed = fmt.Errorf("%w, nor came to it", ErrBusy)

// mostStops bounds how far a thread is followed on its way to its next ppoll, two stops a system call: QEMU's main loop
// makes a few dozen calls a round at most.
const mostStops = 256

// tracee is a thread that this one traces. Between the methods it is stopped: somewhere at first, then at the entry of
// a ppoll (atEntry), or behind a call with everything set to enter the ppoll again.
type tracee struct {
	tid     int
	steps   *steps
	polls   bool // a thread that is not the main one, to be taken in a poll as well
	atEntry bool
	entry   registers // at the entry of the ppoll, or poll
	most    int       // arguments that a call in its place can have
	signal  int       // to be delivered when the thread is resumed
	lost    error     // set when the thread is not ours to resume any more: it ended, or its process was stopped
}

// stop is why a thread stopped.
type stop int

const (
	stopSyscall stop = iota // at the entry or the exit of a system call
	stopSignal              // on its way to deliver a signal
	stopEvent               // PTRACE_INTERRUPT, and others without meaning here
)

// seize begins to trace thread tid of process pid, and does not stop it.
func seize(pid, tid int, seccomp bool, steps *steps) (*tracee, error) {
	options := unix.PTRACE_O_TRACESYSGOOD // vital: see the package comment
	if seccomp {
		options |= unix.PTRACE_O_SUSPEND_SECCOMP
	}
	if err := ptrace(unix.PTRACE_SEIZE, tid, 0, uintptr(options)); err != nil {
		switch {
		case errors.Is(err, unix.ESRCH):
			return nil, fmt.Errorf("%w: %w", ErrGone, err)
		case errors.Is(err, unix.EPERM):
			// The kernel has one answer for all: no right to, already traced, about to end.
			if cause := preflight(pid, tid); cause != nil {
				return nil, cause
			}
		}
		return nil, fmt.Errorf("PTRACE_SEIZE: %w", err)
	}
	steps.pass("seized")
	return &tracee{tid: tid, steps: steps, polls: tid != pid}, nil
}

// interrupt stops the thread wherever it is. A sleeping ppoll ends with ERESTARTNOHAND: the kernel will enter it again.
func (t *tracee) interrupt() error {
	if err := ptrace(unix.PTRACE_INTERRUPT, t.tid, 0, 0); err != nil {
		return gone(err)
	}
	t.steps.pass("interrupting")
	_, err := t.wait()
	t.steps.pass("interrupted")
	return err
}

// toEntry lets the thread run until it stands at the entry of a ppoll. Signals that come up are delivered, and their
// handlers run, on the way.
func (t *tracee) toEntry() error {
	for range mostStops {
		if err := t.resume(); err != nil {
			return err
		}
		t.steps.pass("to entry")
		kind, err := t.wait()
		if err != nil {
			return err
		}
		if kind == stopSyscall {
			info, err := t.syscallInfo()
			if err != nil {
				return err
			}
			if info.op != unix.PTRACE_SYSCALL_INFO_ENTRY || info.arch != auditArch || info.nr != unix.SYS_PPOLL && !t.polls {
				continue
			}
			if err := t.entry.read(t.tid); err != nil {
				return gone(err)
			}
			here, err := t.checkEntry(info.nr)
			if err != nil {
				return err
			}
			if !here {
				continue
			}
			t.atEntry = true
			t.steps.pass("at entry")
			return nil
		}
	}
	return errMissed
}

// checkEntry says whether the call is one that the thread can be taken at, and makes sure that it entered the kernel by the instruction that it
// will be sent back to.
func (t *tracee) checkEntry(nr uint64) (bool, error) {
	var origin [originBytes]byte
	if err := t.peek(t.entry.instruction()-uint64(len(origin)), origin[:]); err != nil {
		return false, fmt.Errorf("read the instruction of its call: %w", err)
	}
	var here bool
	if t.most, here = park(nr, origin[:]); !here {
		return false, nil
	}
	if code := origin[len(origin)-len(syscallInstruction):]; string(code) != syscallInstruction {
		return false, fmt.Errorf("%w: its ppoll was entered by another instruction (%x)", ErrUnsupported, code)
	}
	return true, nil
}

// call executes one system call in place of the ppoll at which the thread stands, or which it is let run to. The thread
// is left behind the call, set to enter its ppoll again.
func (t *tracee) call(name string, number uint64, args ...uint64) (uint64, error) {
	if !t.atEntry {
		if err := t.toEntry(); err != nil {
			return 0, err
		}
	}
	if len(args) > t.most {
		return 0, fmt.Errorf("%w: %s with %d arguments in place of a call in which %d can be given", ErrUnsupported, name, len(args), t.most)
	}
	if err := t.entry.replaceCall(t.tid, number, args, t.steps); err != nil {
		return 0, fmt.Errorf("replace ppoll by %s: %w", name, gone(err))
	}
	t.atEntry = false
	t.steps.pass(name + " set")
	if err := t.resume(); err != nil {
		return 0, err
	}
	t.steps.pass(name + " running")
	kind, err := t.wait()
	if err != nil {
		return 0, err
	}
	if kind != stopSyscall { // no other stop is possible between entry and exit
		return 0, fmt.Errorf("%s: stop of kind %d inside the call", name, kind)
	}
	t.steps.pass(name + " returned")
	info, err := t.syscallInfo()
	if err != nil {
		return 0, err
	}
	if info.op != unix.PTRACE_SYSCALL_INFO_EXIT {
		return 0, fmt.Errorf("%s: stop of kind %d where its exit was due", name, info.op)
	}
	if err := t.entry.rewind(t.tid); err != nil {
		return 0, fmt.Errorf("lead back from %s to ppoll: %w", name, gone(err))
	}
	t.steps.pass(name + " rewound")
	if rval := int64(info.nr); rval < 0 && rval >= -4095 { // MAX_ERRNO, include/linux/err.h
		return 0, &CallError{Call: name, Errno: unix.Errno(-rval)}
	}
	return info.nr, nil
}

// detach lets the thread go, for good. Nothing is lost if it fails: the kernel does the same when the helper ends.
func (t *tracee) detach() error {
	err := ptrace(unix.PTRACE_DETACH, t.tid, 0, uintptr(t.signal))
	t.steps.pass("detached")
	return err
}

func (t *tracee) resume() error {
	if t.lost != nil {
		return t.lost
	}
	err := ptrace(unix.PTRACE_SYSCALL, t.tid, 0, uintptr(t.signal))
	t.signal = 0
	return gone(err)
}

// waitInfo is siginfo_t as waitid fills it in, include/uapi/asm-generic/siginfo.h.
type waitInfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

// Values of waitInfo.code: CLD_TRAPPED, include/uapi/asm-generic/siginfo.h; and the parts of its status for a ptrace stop,
// ptrace(2).
const (
	codeTrapped  = 4
	syscallStop  = int32(unix.SIGTRAP) | 0x80 // by PTRACE_O_TRACESYSGOOD
	eventShift   = 8
	signalOfStop = 0xff
)

// wait waits until the thread has stopped. It looks at the stop and leaves it unconsumed (WNOWAIT). The kill timer
// bounds it.
//
// It sleeps: to spin would save two switches on an idle machine, and takes the processor from the thread on a busy one.
func (t *tracee) wait() (stop, error) {
	for {
		var info waitInfo
		_, _, errno := unix.RawSyscall6(unix.SYS_WAITID, unix.P_PID, uintptr(t.tid), uintptr(unsafe.Pointer(&info)),
			unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT|unix.WALL, 0, 0)
		switch errno {
		case 0:
			return t.classify(info)
		case unix.EINTR:
		case unix.ECHILD:
			t.lost = ErrGone
			return 0, t.lost
		default:
			return 0, fmt.Errorf("waitid: %w", errno)
		}
	}
}

func (t *tracee) classify(info waitInfo) (stop, error) {
	if info.code != codeTrapped {
		t.lost = ErrGone
		return 0, t.lost
	}
	signal := info.status & signalOfStop
	switch event := info.status >> eventShift; {
	case info.status == syscallStop:
		return stopSyscall, nil
	case event == unix.PTRACE_EVENT_STOP && signal != int32(unix.SIGTRAP):
		// The whole process was stopped. Detaching leaves it so; resuming this thread would not.
		t.lost = ErrStopped
		return 0, t.lost
	case event != 0:
		return stopEvent, nil
	}
	t.signal = int(signal)
	return stopSignal, nil
}

// syscallInfo is struct ptrace_syscall_info, include/uapi/linux/ptrace.h (Linux 5.3).
type syscallInfo struct {
	op                 uint8
	_                  [3]uint8
	arch               uint32
	instructionPointer uint64
	stackPointer       uint64
	nr                 uint64 // of an entry; of an exit the result
	_                  [7]uint64
}

func (t *tracee) syscallInfo() (syscallInfo, error) {
	var info syscallInfo
	if err := ptrace(unix.PTRACE_GET_SYSCALL_INFO, t.tid, unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info))); err != nil {
		return info, fmt.Errorf("PTRACE_GET_SYSCALL_INFO: %w", gone(err))
	}
	return info, nil
}

// Scratch memory is scratchBytes long and begins scratchBelow beneath the stack pointer: past the red zone (128 bytes,
// System V ABI for x86-64), with some room besides. Nothing that lives is there, and only a signal handler would put
// something there; none can run between the entry of a call and its exit, which is how long the scratch memory is used.
const (
	scratchBytes = 256
	scratchBelow = 1024 + scratchBytes
)

// withScratch puts content (which may need to know its own address) into the scratch memory, lets use make a call with that
// address, reads the memory back and restores it.
func (t *tracee) withScratch(content func(address uint64) []byte, use func(address uint64) error) (after []byte, err error) {
	if !t.atEntry {
		if err := t.toEntry(); err != nil {
			return nil, err
		}
	}
	address := (t.entry.stack() - scratchBelow) &^ 63
	var before [scratchBytes]byte
	if err := t.peek(address, before[:]); err != nil { // also shows that there is stack
		return nil, fmt.Errorf("no stack beneath its ppoll: %w", err)
	}
	var during [scratchBytes]byte
	if content != nil {
		copy(during[:], content(address))
	}
	if err := t.poke(address, during[:]); err != nil {
		return nil, fmt.Errorf("no stack beneath its ppoll: %w", err)
	}
	t.steps.pass("scratch written")
	err = use(address)
	if err == nil {
		err = t.peek(address, during[:])
	}
	if restoreErr := t.poke(address, before[:]); err == nil {
		err = restoreErr
	}
	t.steps.pass("scratch restored")
	return during[:], err
}

func (t *tracee) peek(address uint64, into []byte) error { return peek(t.tid, address, into) }

func (t *tracee) poke(address uint64, from []byte) error {
	return transfer(unix.ProcessVMWritev, t.tid, address, from)
}

// peek reads the memory of a thread's process.
func peek(tid int, address uint64, into []byte) error {
	return transfer(unix.ProcessVMReadv, tid, address, into)
}

func transfer(how func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error), tid int, address uint64, local []byte) error {
	n, err := how(tid, []unix.Iovec{{Base: &local[0], Len: uint64(len(local))}},
		[]unix.RemoteIovec{{Base: uintptr(address), Len: len(local)}}, 0)
	if err == nil && n != len(local) {
		err = unix.EFAULT
	}
	if err != nil {
		return fmt.Errorf("memory of thread %d at %#x: %w", tid, address, gone(err))
	}
	return nil
}

func littleEndian32(b []byte, at int) int { return int(int32(binary.LittleEndian.Uint32(b[at:]))) }

// ptrace is a raw call: the Go scheduler must not take the occasion to give our processor to another thread.
func ptrace(request, tid int, address, data uintptr) error {
	if _, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), address, data, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
