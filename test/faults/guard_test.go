package faults

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestKeeper kills and stops the keeper of a guard at each step at which there is one. The attempt is lost where the guard was still needed,
// the guest goes on at once or within the bound, and the next attempt holds.
func TestKeeper(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	const bound = 500 * time.Millisecond
	steps := []capture.Step{
		capture.StepGuarded, capture.StepArmed, capture.StepSent, capture.StepHeld, capture.StepScanned, capture.StepKept, capture.StepResidue,
		capture.StepRearmed, capture.StepReleased, capture.StepConfirmed, capture.StepTaken,
	}
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		for range *repeat {
			for _, step := range steps {
				t.Run(fmt.Sprintf("%v/%s", signal, step), func(t *testing.T) {
					b.T = t
					o := through(b, capture.StepGuarded)
					o.WriteBound = bound
					struck := false
					var missed error
					o.Hooks.Step = func(at capture.Step) {
						if at != step || struck {
							return
						}
						pid, err := keeper(os.Getpid())
						if err != nil {
							if step != capture.StepArmed && step != capture.StepSent { // those of the barrier come before there is one
								missed, struck = err, true
							}
							return
						}
						struck = true
						if missed = unix.Kill(pid, signal); missed == nil && !within(20*time.Second, func() bool { return ended(pid) }) {
							missed = fmt.Errorf("the keeper %d is still there; its state is %c", pid, state(pid))
						}
					}
					result, img := b.Capture(t.Context(), o)
					switch {
					case !struck:
						t.Errorf("the step %q never came", step)
					case missed != nil:
						t.Error(missed)
					case result.Attempts < 2:
						t.Errorf("it took %d attempts without a keeper", result.Attempts)
					}
					b.Judge(t.Context(), result, img)
					sound(t, b)
				})
			}
		}
	}
}
