package faults

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestHolder kills and stops the leash's holder at each step of a hold, once: the attempt is lost, the next one holds.
func TestHolder(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	steps := []capture.Step{capture.StepArmed, capture.StepSent, capture.StepHeld, capture.StepScanned, capture.StepResidue, capture.StepRearmed, capture.StepReleased}
	for range *repeat {
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			for _, step := range steps {
				t.Run(fmt.Sprintf("%s/%s", unix.SignalName(sig), step), func(t *testing.T) {
					b.T = t
					o := b.Options()
					o.HoldBound = time.Second
					hit := false
					o.Hooks.Step = func(at capture.Step) {
						if at != step || hit {
							return
						}
						hit = true
						if pid := holder(); pid != 0 {
							unix.Kill(pid, sig) //nolint:errcheck // it may have ended
						}
					}
					begin := time.Now()
					result, img := b.Capture(t.Context(), o)
					b.Judge(t.Context(), result, img)
					t.Logf("%d attempts, %v", result.Attempts, time.Since(begin))
					if !hit {
						t.Error("the step never came")
					}
					for _, p := range result.Pauses {
						if p.Total > 2*time.Second {
							t.Errorf("the guest stood still for %v", p.Total)
						}
					}
					sound(t, b)
				})
			}
		}
	}
}

// TestHolderKilledAlways lets no attempt succeed.
func TestHolderKilledAlways(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	o := b.Options()
	o.Hooks.Step = func(at capture.Step) {
		if at == capture.StepScanned {
			unix.Kill(holder(), unix.SIGKILL) //nolint:errcheck // the test shows
		}
	}
	_, err := capture.Run(t.Context(), b.Target, b.Repository, o)
	var attempts *capture.AttemptsError
	if !errors.As(err, &attempts) {
		t.Errorf("error %v, want that no attempt held", err)
	}
	sound(t, b)
}

// TestHolderKilledInRearm lets the guest run again while tracking starts over, and the guest writes to pages that are just being
// protected: what was copied of them before must not count.
func TestHolderKilledInRearm(t *testing.T) {
	o := options()
	o.MemoryBytes = 384 * machine.MiB
	o.Guest = machine.Writer{Percent: 90, Parameters: writer.Parameters{Random: true, PagesPerPass: 1024}}
	b := truth.NewBench(t, o)
	again := 0
	for range 6 * *repeat {
		o := b.Options()
		o.Mode, o.HoldBound, o.PauseBound = capture.Full, 20*time.Second, 30*time.Second
		hit := false
		o.Hooks.Step = func(at capture.Step) {
			if at != capture.StepResidue || hit {
				return
			}
			hit = true
			pid := holder()
			time.AfterFunc(time.Duration(rand.Int64N(int64(6*time.Millisecond))), func() { unix.Kill(pid, unix.SIGKILL) }) //nolint:errcheck // it may have ended
		}
		result, img := b.Capture(t.Context(), o)
		b.Judge(t.Context(), result, img)
		if result.Attempts > 1 {
			again++
		}
	}
	t.Logf("%d of %d attempts were lost", again, 6**repeat)
	sound(t, b)
}
