package dirty

import (
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/inject"
)

// testRoleVariable tells the test binary to play a part in place of running tests.
const testRoleVariable = "VMCKPT_DIRTY_TEST_ROLE"

func TestMain(m *testing.M) {
	inject.Main()
	if os.Getenv(testRoleVariable) == "memory" {
		playMemory()
		return
	}
	os.Exit(m.Run())
}
