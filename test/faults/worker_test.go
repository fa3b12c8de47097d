package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/truth"
)

// doom has a checkpoint taken by a worker that will be killed. The machine's monitor is the worker's meanwhile.
func doom(t *testing.T, b *truth.Bench, request doomed, started func(pid int)) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b.Disconnect()
	defer b.Connect()
	request.PID, request.Socket, request.Repository = b.Machine.PID, b.Machine.Socket, b.Dir
	return supervise.Run(ctx, "doomed capture", request, nil, supervise.Options{Started: started, Grace: time.Second})
}

func TestWorkerKilled(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	tried := 0
	for _, step := range capture.Steps {
		times := *repeat
		if slices.Index(capture.Steps, step) >= slices.Index(capture.Steps, capture.StepScanned) && step != capture.StepRecorded {
			times *= 2
		}
		for range times {
			for _, family := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/family=%v", step, family), func(t *testing.T) {
					b.T = t
					o := b.Options()
					o.Hooks = capture.Hooks{}
					if slices.Contains(early, step) {
						o.Mode = capture.Full
					}
					err := doom(t, b, doomed{Options: o, At: step, Family: family}, nil)
					var died *supervise.DiedError
					if !errors.As(err, &died) {
						t.Fatalf("the worker was to be killed at %q; it ended with %v", step, err)
					}
					tried++
					sound(t, b)
				})
			}
		}
	}
	t.Logf("%d workers killed", tried)
}

// TestWorkerKilledAnyTime kills at no step in particular.
func TestWorkerKilledAnyTime(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	for range 8 * *repeat {
		o := b.Options()
		o.Hooks = capture.Hooks{}
		if rand.IntN(4) == 0 {
			o.Mode = capture.Full
		}
		after := time.Duration(rand.Int64N(int64(150 * time.Millisecond)))
		err := doom(t, b, doomed{Options: o}, func(pid int) {
			time.AfterFunc(after, func() { unix.Kill(pid, unix.SIGKILL) }) //nolint:errcheck // it may have ended
		})
		var died *supervise.DiedError
		if err != nil && !errors.As(err, &died) {
			t.Fatal(err)
		}
		sound(t, b)
	}
}
