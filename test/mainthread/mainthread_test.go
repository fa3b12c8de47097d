package mainthread

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// roleVariable makes the test binary a child: "astray" begins on another thread.
const roleVariable = "VMCKPT_MAINTHREAD_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(m.Run())
	case "astray":
		runtime.LockOSThread() // whichever it is, the other goroutine gets another one
		os.Setenv(roleVariable, "again")
		done := make(chan error)
		go func() {
			if unix.Gettid() != unix.Getpid() {
				done <- Take()
				return
			}
			runtime.LockOSThread() // keeps the main thread, so that the next goroutine gets another one
			go func() { done <- Take() }()
			select {}
		}()
		fmt.Println("not begun again:", <-done)
	case "again":
		err := Take()
		fmt.Println(unix.Gettid() == unix.Getpid(), err)
	}
}

func TestTakeFromAnotherThread(t *testing.T) {
	for _, role := range []string{"astray", "again"} {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), roleVariable+"="+role)
		if out, err := c.CombinedOutput(); err != nil || string(out) != "true <nil>\n" {
			t.Errorf("%s: %v, %s", role, err, out)
		}
	}
}
