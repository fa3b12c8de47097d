package faults

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestGuestGoesToSleep has the guest go to sleep (ACPI S3) between the last look at its state and QEMU's stop: QEMU stops it, and does not
// start it again. It is to sleep on, and to be woken as ever.
func TestGuestGoesToSleep(t *testing.T) {
	b := truth.NewBench(t, machine.Options{QEMU: machine.V10, MemoryBytes: 256 * machine.MiB, Guest: machine.Linux{WorkMiB: 16}})
	counted(t, b, 0)
	b.Capture(t.Context(), b.Options())
	channel, err := b.Machine.DialChannel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer channel.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	before, err := channel.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	o := b.Options()
	o.Hooks.Step = func(at capture.Step) {
		if at != capture.StepArmed {
			return
		}
		if err := channel.Sleep(t.Context()); err != nil {
			t.Error(err)
			return
		}
		for range 1000 {
			if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state == qemu.StateSuspended {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Error("the guest did not go to sleep")
	}
	_, err = capture.Run(t.Context(), b.Target, b.Repository, o)
	var refused *capture.StateError
	if !errors.As(err, &refused) || refused.State != qemu.StateSuspended {
		t.Errorf("a capture of a guest that sleeps: %v", err)
	}
	t.Log(err)
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StateSuspended {
		t.Fatalf("the guest that sleeps is %q, %v", state, err)
	}
	if err := b.Machine.Monitor.Execute(t.Context(), "system_wakeup", nil, nil); err != nil {
		t.Fatal(err)
	}
	counted(t, b, before.Count+5)
}

// counted waits until a Linux guest has said that it counted so far.
func counted(t *testing.T, b *truth.Bench, to uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, _, err := b.Machine.Serial.WaitLine(ctx, 0, func(line string) bool {
		state, ok := workload.ParseState(line)
		return ok && state.Count >= to
	}); err != nil {
		t.Fatalf("the guest did not count to %d: %v", to, err)
	}
}
