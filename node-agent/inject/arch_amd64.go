package inject

import (
	"bytes"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	auditArch          = unix.AUDIT_ARCH_X86_64 // include/uapi/linux/audit.h
	elfMachine         = 62                     // EM_X86_64, include/uapi/linux/elf-em.h
	syscallInstruction = "\x0f\x05"             // syscall

	// mostArguments: the sixth, r9, stays as it is, since glibc's ppoll keeps the thread's cancellation state there across
	// the call. Its poll keeps it in that of the fifth, and has three arguments itself.
	mostArguments     = 5
	mostArgumentsPoll = 3

	// originBytes is how much of the code before the end of a call's instruction tells which call that was.
	originBytes = len(loadPoll) + len(syscallInstruction)
	loadPoll    = "\xb8\x07\x00\x00\x00" // mov $7, %eax: the number of poll, as glibc's poll has it before its instruction
)

// park says whether a thread that enters this call can be taken there, and how many arguments of another call it then can be given. origin is
// the code up to the end of the instruction.
//
// An interrupted poll is not entered again under its own number but as restart_syscall, as futex waits and sleeps are: its code tells it from
// those.
func park(nr uint64, origin []byte) (arguments int, ok bool) {
	switch nr {
	case unix.SYS_PPOLL:
		return mostArguments, true
	case unix.SYS_POLL:
		return mostArgumentsPoll, true
	case unix.SYS_RESTART_SYSCALL:
		return mostArgumentsPoll, bytes.HasPrefix(origin, []byte(loadPoll))
	}
	return 0, false
}

// registers are those of a thread at the entry of its ppoll or poll.
type registers struct{ at unix.PtraceRegs }

func (r *registers) read(tid int) error {
	return ptrace(unix.PTRACE_GETREGS, tid, 0, uintptr(unsafe.Pointer(&r.at)))
}

func (r *registers) instruction() uint64 { return r.at.Rip }
func (r *registers) stack() uint64       { return r.at.Rsp }
func (r *registers) number() uint64      { return r.at.Orig_rax }
func (r *registers) sixth() uint64       { return r.at.R9 }

// replaceCall makes the thread, stopped at the entry, execute another call. One PTRACE_SETREGS: there is no half-way.
func (r *registers) replaceCall(tid int, number uint64, args []uint64, _ *steps) error {
	regs := r.at
	regs.Orig_rax = number
	for i, into := range []*uint64{&regs.Rdi, &regs.Rsi, &regs.Rdx, &regs.R10, &regs.R8} {
		if i < len(args) {
			*into = args[i]
		}
	}
	return ptrace(unix.PTRACE_SETREGS, tid, 0, uintptr(unsafe.Pointer(&regs)))
}

// rewind makes the thread, stopped at the exit of the other call, execute its own from the start. orig_rax = -1 says
// "in no system call", so that the kernel does not think of restarting one.
func (r *registers) rewind(tid int) error {
	regs := r.at
	regs.Rax = r.number()
	regs.Orig_rax = ^uint64(0)
	regs.Rip -= uint64(len(syscallInstruction))
	return ptrace(unix.PTRACE_SETREGS, tid, 0, uintptr(unsafe.Pointer(&regs)))
}
