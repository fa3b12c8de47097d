package faults

import (
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/faultyfs"
)

// This binary is all the processes that take part: the test, the workers that it dooms, and what they start; which one it is, the
// environment says.
func TestMain(m *testing.M) {
	beReadyToHang()
	faultyfs.Main()
	guard.Main()
	inject.Main()
	mapFile()
	supervise.Main(map[string]supervise.Job{"doomed capture": doomedCapture, "doomed question": doomedQuestion}, func(error) string { return "" })
	os.Exit(m.Run())
}
