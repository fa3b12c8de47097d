package faults

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/faultyfs"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// hungFor is how long a volume hangs: longer than a write of the guest's may wait for the guard, and than a hold may last.
const hungFor = 700 * time.Millisecond

// TestVolume has the repository's volume fail from each step of a checkpoint on, in every way that a volume does. The guest goes on, whatever
// becomes of the checkpoint; what hangs or is slow only takes its time.
func TestVolume(t *testing.T) {
	m := options()
	m.MemoryBytes = 64 * machine.MiB // more than all buffers on the way hold
	b := truth.NewBench(t, m)
	volume := faultyfs.Mount(t)
	b.UseRepository(volume.Dir)
	b.Capture(t.Context(), b.Options())
	// In the hold and around it nothing is written that was not before; what follows it is.
	steps := []capture.Step{
		capture.StepBegun, capture.StepHarvested, capture.StepBarrier, capture.StepGuarded, capture.StepKept, capture.StepReleased,
		capture.StepConfirmed, capture.StepTaken, capture.StepSealing,
	}
	errnos := map[faultyfs.Fault]unix.Errno{faultyfs.EIO: unix.EIO, faultyfs.Full: unix.ENOSPC, faultyfs.ReadOnly: unix.EROFS}
	for _, fault := range []faultyfs.Fault{faultyfs.EIO, faultyfs.Full, faultyfs.ReadOnly, faultyfs.Slow, faultyfs.Hangs} {
		for range *repeat {
			for _, step := range steps {
				t.Run(fmt.Sprintf("%s/%s", fault, step), func(t *testing.T) {
					b.T = t
					t.Cleanup(func() { volume.Set(faultyfs.None) })
					o := through(b, step)
					if !slices.Contains(early, step) { // all the others with a guard
						o = through(b, capture.StepGuarded)
					}
					o.WriteBound = 200 * time.Millisecond
					met := volume.Set(faultyfs.None)
					came := false
					hanging := make(chan struct{}, 1)
					o.Hooks.Step = func(at capture.Step) {
						if at != step || came {
							return
						}
						came = true
						volume.Set(fault)
						if fault == faultyfs.Hangs {
							hanging <- struct{}{}
						}
					}
					type outcome struct {
						result *capture.Result
						err    error
					}
					done := make(chan outcome, 1)
					go func() {
						result, err := capture.Run(t.Context(), b.Target, b.Repository, o)
						done <- outcome{result, err}
					}()
					// Meanwhile the guest is seen to go on, again and again.
					var got outcome
					var over <-chan time.Time
					for ended := false; !ended; {
						select {
						case got = <-done:
							ended = true
						case <-hanging:
							over = time.After(hungFor)
						case <-over:
							volume.Set(faultyfs.None)
						case <-time.After(10 * time.Millisecond):
							goesOn(t, b.Machine)
						}
					}
					metNow := volume.Set(faultyfs.None)
					want, fails := errnos[fault]
					switch {
					case !came:
						t.Errorf("the step %q never came: %v", step, got.err)
					case metNow == met:
						t.Error("the volume was not asked for anything")
					case fails && !errors.Is(got.err, want):
						t.Errorf("error %v, want %v", got.err, want)
					case fails:
					case got.err != nil:
						t.Errorf("the volume was only %s: %v", fault, got.err)
					default:
						img, err := b.Repository.Open(t.Context(), o.Name)
						if err != nil {
							t.Fatal(err)
						}
						b.Judge(t.Context(), got.result, img)
						img.Close()
						t.Logf("%d attempts, pauses of %v together: %q", got.result.Attempts, got.result.Downtime, got.result.Lost)
					}
					sound(t, b)
				})
			}
		}
	}
}
