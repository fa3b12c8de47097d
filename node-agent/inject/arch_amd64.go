package inject

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	auditArch          = unix.AUDIT_ARCH_X86_64 // include/uapi/linux/audit.h
	elfMachine         = 62                     // EM_X86_64, include/uapi/linux/elf-em.h
	syscallInstruction = "\x0f\x05"             // syscall

	// mostArguments: the sixth, r9, stays as it is, since glibc's ppoll keeps the thread's cancellation state there across
	// the call.
	mostArguments = 5
)

// registers are those of a thread at the entry of its ppoll.
type registers struct{ at unix.PtraceRegs }

func (r *registers) read(tid int) error {
	return ptrace(unix.PTRACE_GETREGS, tid, 0, uintptr(unsafe.Pointer(&r.at)))
}

func (r *registers) instruction() uint64 { return r.at.Rip }
func (r *registers) stack() uint64       { return r.at.Rsp }

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

// rewind makes the thread, stopped at the exit of the other call, execute the ppoll from the start. orig_rax = -1 says
// "in no system call", so that the kernel does not think of restarting one.
func (r *registers) rewind(tid int) error {
	regs := r.at
	regs.Rax = unix.SYS_PPOLL
	regs.Orig_rax = ^uint64(0)
	regs.Rip -= uint64(len(syscallInstruction))
	return ptrace(unix.PTRACE_SETREGS, tid, 0, uintptr(unsafe.Pointer(&regs)))
}
