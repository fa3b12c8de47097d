package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// TestTold: what an object says of a machine that was not found names no other.
func TestTold(t *testing.T) {
	err := fmt.Errorf("capture: %w", &qemu.NoMatchError{Wanted: qemu.Selector{Guest: "mine_web"}, Present: []*qemu.Process{{PID: 7, Guest: "theirs_db"}}})
	if text := told(err).Error(); strings.Contains(text, "theirs") || text == "" {
		t.Errorf("told: %q", text)
	}
	if other := errors.New("a full volume"); told(other) != other {
		t.Error("another error is not told as it is")
	}
}
