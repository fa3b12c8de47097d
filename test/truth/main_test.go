package truth

import (
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
)

func TestMain(m *testing.M) {
	guard.Main()
	inject.Main()
	os.Exit(m.Run())
}
