package pagetable

import (
	"os"
	"testing"
)

// childMark names the environment variable that makes the test binary the process under observation.
const childMark = "PAGETABLE_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childMark) != "" {
		childMain()
	}
	os.Exit(m.Run())
}
