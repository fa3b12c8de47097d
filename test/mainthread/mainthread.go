// Package mainthread puts the program of a test's child process on the process's main thread.
//
// What is injected into a process is injected into its main thread, the one whose id is the process's: a child that plays QEMU has to wait
// there, as QEMU's main loop does. Go promises main that thread only where an init function has locked it, for every test in the binary; it
// mostly runs there, and now and then elsewhere.
package mainthread

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Take locks the calling goroutine to the main thread. Where it runs on another one the program is executed again, with the same arguments,
// environment and inherited files: execve(2) makes the thread that calls it the main one. So it comes first of all, in TestMain.
func Take() error {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		return nil
	}
	return fmt.Errorf("begin again on the main thread: %w", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}
