package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestFailedCheckpointsLeaveNothingOpen: a QEMU whose command does not come to its end keeps its pipe open, and may have no more than a
// thousand files.
func TestFailedCheckpointsLeaveNothingOpen(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	open := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.Machine.PID))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	fails := errors.New("nothing went wrong but this")
	fail := func() {
		o := b.Options()
		o.Hooks.Held = func(context.Context, qemu.Layout) error { return fails }
		if _, err := capture.Run(t.Context(), b.Target, b.Repository, o); !errors.Is(err, fails) {
			t.Fatalf("error %v", err)
		}
	}
	before := open()
	for range 5 {
		fail()
	}
	if after := open(); after > before {
		t.Errorf("QEMU had %d files open, and has %d after checkpoints that failed", before, after)
	}
	sound(t, b)
}
