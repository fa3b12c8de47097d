package inject

import (
	"fmt"
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/test/mainthread"
)

// childMark names the environment variable that makes the test binary a process to inject into, or one with a kill timer.
const childMark = "INJECT_TEST_CHILD"

func TestMain(m *testing.M) {
	Main()
	switch mode := os.Getenv(childMark); mode {
	case "":
		os.Exit(m.Run())
	case childKillTimer:
		killTimerMain()
	default:
		if err := mainthread.Take(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		childMain(mode)
	}
}
