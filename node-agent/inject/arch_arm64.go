package inject

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// UNTESTED: written from the kernel's sources (arch/arm64/kernel/ptrace.c), never run.

const (
	auditArch          = unix.AUDIT_ARCH_AARCH64 // include/uapi/linux/audit.h
	elfMachine         = 183                     // EM_AARCH64, include/uapi/linux/elf-em.h
	syscallInstruction = "\x01\x00\x00\xd4"      // svc #0
	mostArguments      = 5
	originBytes        = len(syscallInstruction)
)

// park says whether a thread that enters this call can be taken there, and how many arguments of another call it then can be given. There is
// no poll on this architecture: glibc makes it of ppoll.
func park(nr uint64, _ []byte) (arguments int, ok bool) { return mostArguments, nr == unix.SYS_PPOLL }

// registers are those of a thread at the entry of its ppoll. x8, which holds the number, is never changed: the number
// that the kernel executes is a register set of its own, NT_ARM_SYSTEM_CALL.
type registers struct{ at unix.PtraceRegsArm64 }

func (r *registers) read(tid int) error {
	return registerSet(unix.PTRACE_GETREGSET, tid, unix.NT_PRSTATUS, unsafe.Pointer(&r.at), unsafe.Sizeof(r.at))
}

func (r *registers) instruction() uint64 { return r.at.Pc }
func (r *registers) stack() uint64       { return r.at.Sp }
func (r *registers) sixth() uint64       { return r.at.Regs[5] }

// replaceCall makes the thread, stopped at the entry, execute another call. Number and arguments are two writes here,
// so a harmless call stands between them: a tracer that dies there leaves neither a ppoll with our arguments nor our
// call with those of the ppoll.
func (r *registers) replaceCall(tid int, number uint64, args []uint64, steps *steps) error {
	if err := setNumber(tid, unix.SYS_GETPID); err != nil {
		return err
	}
	steps.pass("getpid set")
	regs := r.at
	copy(regs.Regs[:mostArguments], args)
	if err := setRegisters(tid, &regs); err != nil {
		return err
	}
	steps.pass("arguments set")
	return setNumber(tid, number)
}

// rewind makes the thread, stopped at the exit of the other call, execute the ppoll from the start. Its first argument
// shares x0 with the result.
func (r *registers) rewind(tid int) error {
	regs := r.at
	regs.Pc -= uint64(len(syscallInstruction))
	return setRegisters(tid, &regs)
}

func setNumber(tid int, number uint64) error {
	n := int32(number)
	return registerSet(unix.PTRACE_SETREGSET, tid, unix.NT_ARM_SYSTEM_CALL, unsafe.Pointer(&n), unsafe.Sizeof(n))
}

func setRegisters(tid int, regs *unix.PtraceRegsArm64) error {
	return registerSet(unix.PTRACE_SETREGSET, tid, unix.NT_PRSTATUS, unsafe.Pointer(regs), unsafe.Sizeof(*regs))
}

func registerSet(request, tid, set int, data unsafe.Pointer, bytes uintptr) error {
	iov := unix.Iovec{Base: (*byte)(data), Len: uint64(bytes)}
	return ptrace(request, tid, uintptr(set), uintptr(unsafe.Pointer(&iov)))
}
