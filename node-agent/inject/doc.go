// Package inject executes system calls inside another process: the userfaultfd, the pipe and the memory file that a capture
// needs to exist in QEMU can only be made there.
//
// In go a process id and a [Program], a list of typed operations. Out come the files that now exist in that process, each
// with an identity by which it is known again. All operations of a program are done in one stop of one thread, some hundred
// microseconds in all; the other threads of the process run on.
//
// What must hold: the process goes on unharmed at whatever instruction the one that injects dies, kill -9 included. At worst
// a file stays open in it.
//
// # How
//
// The thread is taken at the entry of a ppoll, the call in which QEMU's main thread waits. Parked there it is interrupted,
// which makes the kernel restart the ppoll by itself, and stopped at the entry of that restarted call:
//
//	PTRACE_SEIZE, PTRACE_INTERRUPT     the thread leaves its ppoll and stops
//	PTRACE_SYSCALL                     it stops at the entry of the restarted ppoll
//	PTRACE_SETREGS                     number and arguments of the ppoll are replaced by those of our call
//	PTRACE_SYSCALL                     it executes our call and stops at its exit
//	PTRACE_SETREGS                     result read; number, arguments and instruction pointer as before the ppoll
//	PTRACE_SYSCALL or PTRACE_DETACH    it enters its ppoll again: for the next call, or for good
//
// A tracer that dies takes its stops with it, and the thread runs on from where it stands:
//
//   - before the first SETREGS, or after the second: it enters its ppoll, as it would have.
//   - in between: it executes our call in place of its ppoll and sees our result as that of the ppoll: a few "ready"
//     descriptors, or an error. No program may rely on more than that from ppoll: the revents fields say what is ready,
//     and they are zero (the interrupted ppoll wrote them; QEMU and GLib clear them before a fresh one). QEMU's main
//     loop finds nothing to do and polls again.
//
// What has to be done while the main thread is held (KVM's dirty log: [FindMemorySlots] and its like) is done in the thread that serves QEMU's
// monitors, [MonitorThread], by a helper that was started before, [Resident]. GLib has that thread wait in poll, which differs: an
// interrupted poll is restarted as restart_syscall, whose state the kernel keeps in the thread until it sleeps in another call, so that thread is led
// back to that; and glibc keeps the cancellation state in the register of the fifth argument, so our calls there have three. If the helper
// dies in between, GLib sees our result in place of poll's, finds no events, and polls again; of an error it says a line on standard error.
//
// This is why an existing call is replaced, and never the instruction pointer turned to one of ours: there is no instant at
// which the thread's way home is known to the tracer alone.
//
// More that this rests on:
//
//   - Only the argument registers that our call needs are changed, five at most. glibc keeps the thread's cancellation
//     state in the register of the sixth across ppoll, and reads it after the call. The sixth of an mmap, its offset, is the zero that
//     is there, or the call is not made.
//   - PTRACE_O_TRACESYSGOOD is no convenience: without it a thread whose tracer dies just before it has seen a system
//     call stop gets a real SIGTRAP and dies. With it the kernel discards the number.
//   - Stops are looked at and never consumed (waitid with WNOWAIT): a signal on its way to the process is delivered by the
//     kernel if the tracer dies there.
//   - ppoll writes the time that remains back before it is restarted, and its signal mask is put back by the kernel
//     before the restart and taken anew by it: both survive any number of rounds.
//   - What our call reads or writes in memory lies well below the thread's stack pointer and its red zone, where nothing is
//     alive; it is put back all the same.
//   - A call that sleeps is never injected.
//   - While a seccomp filter is suspended (PTRACE_O_SUSPEND_SECCOMP) a tracer's death brings it back before our call is
//     checked. The calls used here are refused by no filter in use with more than an error (QEMU's own sandbox lets
//     them through).
//   - PTRACE_O_EXITKILL is never set.
//
// # The helper
//
// ptrace belongs to a thread and a stop must not wait for anything, so the work is done by a process of its own: this
// binary executed again, recognised by [Main], with all signals blocked, its memory locked and a kernel timer that
// kills it when its time is up ([KillTimer]; the holder of a leash has one too). It is always right to kill it.
package inject
