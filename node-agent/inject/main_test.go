package inject

import (
	"os"
	"runtime"
	"testing"
)

// childMark names the environment variable that makes the test binary a process to inject into.
const childMark = "INJECT_TEST_CHILD"

func init() {
	if os.Getenv(childMark) != "" {
		runtime.LockOSThread() // keeps main, and so TestMain, on the main thread
	}
}

func TestMain(m *testing.M) {
	Main()
	if mode := os.Getenv(childMark); mode != "" {
		childMain(mode)
	}
	os.Exit(m.Run())
}
