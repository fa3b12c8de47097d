package faults

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestResumedByOthers has somebody resume the machine whenever it stands, as virt-launcher does, and without even looking.
func TestResumedByOthers(t *testing.T) {
	b := truth.NewBench(t, options())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			b.Machine.Monitor.Execute(ctx, "cont", nil, nil) //nolint:errcheck // it is a nuisance
			time.Sleep(time.Millisecond)
		}
	}()
	for range 10 * *repeat {
		result, img := b.Capture(t.Context(), b.Options())
		b.Judge(t.Context(), result, img)
	}
	cancel()
	<-done
	sound(t, b)
}

// TestPausedByOwner: a machine that stands keeps standing.
func TestPausedByOwner(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	if err := b.Machine.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		result, img := b.Capture(t.Context(), b.Options())
		b.Judge(t.Context(), result, img)
		if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePaused {
			t.Fatalf("the machine that its owner paused is %q, %v", state, err)
		}
	}
	// And while it is paused, all that kills a capture leaves it so.
	o := b.Options()
	o.Hooks = capture.Hooks{}
	err := doom(t, b, doomed{Options: o, At: capture.StepHeld, Family: true}, nil)
	if err == nil {
		t.Fatal("the worker was not killed")
	}
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePaused {
		t.Fatalf("the machine that its owner paused is %q after a worker was killed, %v", state, err)
	}
	if err := b.Machine.Continue(t.Context()); err != nil {
		t.Fatal(err)
	}
	sound(t, b)
}

// TestOwnerPausesAndResumes does so at random while checkpoints are taken: each is exact, or not there.
func TestOwnerPausesAndResumes(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			for _, command := range []string{"stop", "cont"} {
				b.Machine.Monitor.Execute(t.Context(), command, nil, nil) //nolint:errcheck // the state is looked at later
				time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Millisecond))))
			}
		}
	}()
	var taken, refused int
	for range 12 * *repeat {
		o := b.Options()
		result, err := capture.Run(t.Context(), b.Target, b.Repository, o)
		if err != nil {
			refused++
			continue
		}
		taken++
		img, err := b.Repository.Open(t.Context(), o.Name)
		if err != nil {
			t.Fatal(err)
		}
		b.Judge(t.Context(), result, img)
		img.Close()
	}
	cancel()
	<-done
	t.Logf("%d checkpoints taken, %d given up", taken, refused)
	sound(t, b)
}

// TestCancelled ends the context at each step.
func TestCancelled(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	for _, step := range capture.Steps {
		if slices.Contains(early, step) {
			continue
		}
		t.Run(string(step), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := b.Options()
			o.Hooks.Step = func(at capture.Step) {
				if at == step {
					cancel()
				}
			}
			_, err := capture.Run(ctx, b.Target, b.Repository, o)
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			sound(t, b)
		})
	}
}
