package guard

import (
	"os"
	"testing"
)

// testRoleVariable tells the test binary to play a part in place of running tests.
const testRoleVariable = "VMCKPT_GUARD_TEST_ROLE"

func TestMain(m *testing.M) {
	Main()
	if os.Getenv(testRoleVariable) == "worker" {
		runWorkerChild()
		return
	}
	os.Exit(m.Run())
}
