package guard

import (
	"os"
	"testing"
)

// testRoleVariable tells the test binary to play a part in place of running tests.
const testRoleVariable = "VMCKPT_GUARD_TEST_ROLE"

func TestMain(m *testing.M) {
	Main()
	switch os.Getenv(testRoleVariable) {
	case "worker":
		runWorkerChild()
	case "killtimer":
		runKillTimerChild()
	default:
		os.Exit(m.Run())
	}
}
