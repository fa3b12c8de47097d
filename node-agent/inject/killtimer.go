package inject

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KillTimer is a timer in the kernel that kills this process with SIGKILL. It is the watchdog of processes that others wait for, the helper
// and the holder of a leash: it needs nobody to run, the process least of all, so it ends one that was stopped (SIGSTOP), that hangs or that
// the scheduler forgot.
type KillTimer struct{ id int32 }

// sigevent is struct sigevent of the kernel's include/uapi/asm-generic/siginfo.h: 64 bytes on 64-bit machines.
type sigevent struct {
	value  uint64
	signo  int32
	notify int32
	_      [48]byte
}

// sigevSignal is SIGEV_SIGNAL of include/uapi/asm-generic/siginfo.h.
const sigevSignal = 0

// itimerspec is struct __kernel_itimerspec of include/uapi/linux/time_types.h.
type itimerspec struct {
	interval, value unix.Timespec
}

// NewKillTimer makes a timer that is not running yet.
func NewKillTimer() (KillTimer, error) {
	var t KillTimer
	ev := sigevent{signo: int32(unix.SIGKILL), notify: sigevSignal}
	_, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC,
		uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(&t.id)))
	if errno != 0 {
		return KillTimer{}, fmt.Errorf("make a kill timer: %w", errno)
	}
	return t, nil
}

// Set lets the timer kill this process after d, in place of any earlier setting. A d of zero or less switches it off.
func (t KillTimer) Set(d time.Duration) error {
	spec := itimerspec{value: unix.NsecToTimespec(max(0, d.Nanoseconds()))}
	_, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(t.id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("set a kill timer to %v: %w", d, errno)
	}
	return nil
}
