package faults

import (
	"errors"
	"slices"
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestAnotherRecordDirectory has somebody else, who keeps session records elsewhere and so sees no lock, take a checkpoint in the middle of
// ours: it takes tracking over, and what it re-arms does not show to us.
func TestAnotherRecordDirectory(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	for _, step := range []capture.Step{capture.StepInvalidated, capture.StepHarvested, capture.StepArmed, capture.StepReleased, capture.StepSealing} {
		t.Run(string(step), func(t *testing.T) {
			b.T = t
			o := b.Options()
			if slices.Contains(early, step) {
				o.Mode = capture.Full
			}
			done := false
			o.Hooks.Step = func(at capture.Step) {
				if at != step || done {
					return
				}
				done = true
				other := b.Options()
				other.RecordDir, other.Hooks = t.TempDir(), capture.Hooks{}
				if _, err := capture.Run(t.Context(), b.Target, b.Repository, other); err != nil {
					t.Errorf("the other checkpoint: %v", err)
				}
				goesOn(t, b.Machine)
			}
			result, err := capture.Run(t.Context(), b.Target, b.Repository, o)
			if !done {
				t.Fatal("the step never came")
			}
			if err != nil {
				t.Log(err)
				if !errors.Is(err, dirty.ErrUntracked) {
					t.Errorf("error %v, want that tracking was lost", err)
				}
			} else {
				img, err := b.Repository.Open(t.Context(), o.Name)
				if err != nil {
					t.Fatal(err)
				}
				defer img.Close()
				b.Judge(t.Context(), result, img)
			}
			sound(t, b)
		})
	}
}
