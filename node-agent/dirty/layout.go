package dirty

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Blocks gives a machine's layout to the tracking. Whoever opens the session of a process does so with these: a record holds for one
// layout.
func Blocks(ctx context.Context, m qemu.Monitor, layout qemu.Layout) ([]Block, error) {
	// A balloon punches holes into memory at any time, and free page reporting is a function of the balloon too.
	balloon := true
	err := m.Execute(ctx, "query-balloon", nil, nil)
	var refused *qemu.QMPError
	switch {
	case errors.As(err, &refused) && refused.Class == "DeviceNotActive":
		balloon = false
	case errors.As(err, &refused) || err == nil: // it has one, or cannot tell
	default:
		return nil, fmt.Errorf("ask for a balloon: %w", err)
	}
	blocks := make([]Block, len(layout))
	for i, b := range layout {
		blocks[i] = Block{Name: b.Name, HVA: b.HVA, Bytes: b.Bytes, HostPageBytes: b.HostPageBytes, Discards: balloon}
	}
	return blocks, nil
}
