package faults

import (
	"errors"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestStates: a machine that never ran is refused, and left as it is.
func TestStates(t *testing.T) {
	o := options()
	o.Paused = true
	b := truth.NewBench(t, o)
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a machine that was never started: error %v", err)
	}
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePrelaunch {
		t.Errorf("it is %q, %v", state, err)
	}
}
