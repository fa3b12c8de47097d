package main

import (
	"fmt"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// oldKernelVariable makes the test binary see the kernel as one before Linux 6.7, and all processes that it starts.
const oldKernelVariable = "VMCKPT_TEST_OLD_KERNEL"

// becomeOldKernel has the kernel refuse, to this process and its children, what Linux 6.1 refuses: PAGEMAP_SCAN, which it does not
// know, and the handshake of a userfaultfd with features that it does not know. (include/uapi/linux/fs.h, userfaultfd.h)
func becomeOldKernel() error {
	const (
		numberAt, requestAt = 0, 24 // struct seccomp_data: nr, the low half of args[1]
		pagemapScan         = 0xc0606610
		uffdioAPI           = 0xc018aa3f
	)
	fail := func(errno unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(errno) }
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: numberAt},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IOCTL, Jf: 5},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: requestAt},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: pagemapScan, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: fail(unix.ENOTTY)},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uffdioAPI, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: fail(unix.EINVAL)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// On all threads: the Go runtime has several by now.
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("set a seccomp filter: %w", errno)
	}
	return nil
}

// TestOldKernel goes the whole way on a kernel that cannot track pages: increments come by content hash, copied in the pause.
func TestOldKernel(t *testing.T) {
	t.Setenv(oldKernelVariable, "1")
	for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
		t.Run(fmt.Sprint(memory), func(t *testing.T) {
			s, records := newShell(t), t.TempDir()
			m := machine.Start(t, machine.Options{Memory: memory, MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{
				Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, DMAPagesPerPass: 2, Spin: 100_000},
			}})
			name := m.Options().Name
			process[captureJSON](s, records, 0, "capture", name, "--name", "base")
			goesOn(t, m)
			increment := process[captureJSON](s, records, 0, "capture", name, "--name", "increment")
			if increment.Kind != "increment" || increment.Source != "content hash" || increment.Pages.Unchanged == 0 {
				t.Errorf("increment: %+v", increment)
			}
			if increment.Pages.Unpopulated == 0 {
				t.Errorf("no page of a guest that uses half of its memory is unpopulated: %+v", increment.Pages)
			}
			at := passes(t, m)
			goesOn(t, m)
			if n := userfaultfds(t, m.PID); n != 0 {
				t.Errorf("%d userfaultfds in a process that is not tracked", n)
			}

			process[restoreJSON](s, records, 0, "restore", "increment", name, "--in-place", "--full-compare")
			if back := passes(t, m); back > at {
				t.Errorf("rolled back to pass %d; the image was made before pass %d", back, at)
			}
			if err := m.Continue(t.Context()); err != nil {
				t.Fatal(err)
			}
			goesOn(t, m)

			twin := m.Twin()
			twin.Name += "-twin"
			fresh := machine.Start(t, twin)
			process[restoreJSON](s, records, 0, "restore", "increment", twin.Name, "--run", "--full-compare")
			goesOn(t, fresh)
		})
	}
}

// asOldKernel is what TestMain does before anything else where it is asked for.
func asOldKernel() {
	if os.Getenv(oldKernelVariable) == "" || os.Getenv(mainVariable) == "" {
		return
	}
	if err := becomeOldKernel(); err != nil {
		fmt.Fprintln(os.Stderr, "become an old kernel:", err)
		os.Exit(99)
	}
}
