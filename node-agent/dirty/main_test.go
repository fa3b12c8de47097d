package dirty

import (
	"fmt"
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/test/mainthread"
)

// testRoleVariable tells the test binary to play a part in place of running tests.
const testRoleVariable = "VMCKPT_DIRTY_TEST_ROLE"

func TestMain(m *testing.M) {
	inject.Main()
	if os.Getenv(testRoleVariable) == "memory" {
		if err := mainthread.Take(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		playMemory()
		return
	}
	os.Exit(m.Run())
}
