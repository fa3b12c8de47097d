package truth

import (
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

func TestMain(m *testing.M) {
	guard.Main()
	inject.Main()
	supervise.Main(map[string]supervise.Job{doomedJob: doomedCapture}, func(error) string { return "" })
	os.Exit(m.Run())
}
