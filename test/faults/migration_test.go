package faults

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestMigration starts a migration at every step of a checkpoint: one that goes on and on, and is cancelled, and, in the steps of the
// instant, one that ends.
func TestMigration(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		begin := func(t *testing.T) *truth.Bench {
			o := options()
			o.QEMU, o.Accel = version, machine.TCG
			b := truth.NewBench(t, o)
			b.Capture(t.Context(), b.Options())
			return b
		}
		t.Run(fmt.Sprintf("%s/cancelled", version), func(t *testing.T) {
			b := begin(t)
			for _, step := range capture.Steps {
				if slices.Contains(early, step) {
					continue // they come in a capture without tracking alone
				}
				t.Run(string(step), func(t *testing.T) {
					b.T = t
					migrate(t, b, step, false)
				})
			}
		})
		for _, step := range []capture.Step{capture.StepArmed, capture.StepSent, capture.StepHeld, capture.StepResidue, capture.StepReleased, capture.StepSealing} {
			t.Run(fmt.Sprintf("%s/ends/%s", version, step), func(t *testing.T) { migrate(t, begin(t), step, true) })
		}
	}
}

func migrate(t *testing.T, b *truth.Bench, step capture.Step, ends bool) {
	bandwidth := 64 << 10
	if ends {
		bandwidth = 1 << 30
	}
	execute := func(command string, args any) error {
		return b.Machine.Monitor.Execute(t.Context(), command, args, nil)
	}
	if err := execute("migrate-set-parameters", map[string]any{"max-bandwidth": bandwidth, "downtime-limit": 2000}); err != nil {
		t.Fatal(err)
	}
	o := b.Options()
	started := make(chan error, 1)
	begun := false
	o.Hooks.Step = func(at capture.Step) {
		if at == step && !begun {
			begun = true
			// In a hold it waits for its end, like everybody.
			go func() { started <- execute("migrate", map[string]any{"uri": "exec:cat >/dev/null"}) }()
			time.Sleep(2 * time.Millisecond)
		}
	}
	result, captured := capture.Run(t.Context(), b.Target, b.Repository, o)
	if err := <-started; err != nil {
		t.Fatalf("migrate: %v", err)
	}
	t.Logf("the checkpoint: %v", captured)
	if captured == nil {
		img, err := b.Repository.Open(t.Context(), o.Name)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		b.Judge(t.Context(), result, img)
	} else if !errors.Is(captured, capture.ErrMigrating) && !errors.Is(captured, capture.ErrStopped) {
		t.Errorf("error %v, want that it is migrating", captured)
	}
	if !ends {
		if err := execute("migrate_cancel", nil); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		m, err := qemu.Migration(t.Context(), b.Machine.Monitor)
		if err != nil {
			t.Fatal(err)
		}
		if m.Status == qemu.MigrationCompleted || m.Status == qemu.MigrationCancelled || m.Status == qemu.MigrationFailed {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the migration hangs in %q", m.Status)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !ends {
		sound(t, b)
		return
	}
	// It has moved away: nothing of ours may wake it here.
	time.Sleep(50 * time.Millisecond)
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePostMigrate {
		t.Errorf("the machine that has migrated away is %q, %v", state, err)
	}
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a machine that has migrated away: error %v", err)
	}
}
