package faults

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestQEMUDies at every step: the checkpoint ends with an error, soon, and leaves nothing.
func TestQEMUDies(t *testing.T) {
	for _, step := range capture.Steps {
		if slices.Contains(early, step) || step == capture.StepRecorded || step == capture.StepSealed {
			continue
		}
		t.Run(string(step), func(t *testing.T) {
			b := truth.NewBench(t, options())
			b.Capture(t.Context(), b.Options())
			o := b.Options()
			o.Hooks.Step = func(at capture.Step) {
				if at == step {
					b.Machine.Kill() //nolint:errcheck // the test shows
				}
			}
			begin := time.Now()
			_, err := capture.Run(t.Context(), b.Target, b.Repository, o)
			t.Logf("after %v: %v", time.Since(begin), err)
			// Once the machine was let go all of the image is here, and it may be sealed though its QEMU is gone.
			if err == nil && slices.Index(capture.Steps, step) < slices.Index(capture.Steps, capture.StepReleased) {
				t.Error("a checkpoint of a machine that died")
			}
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("it took %v to notice", took)
			}
			wholeImages(t, b)
		})
	}
}

// TestDeviceStateShorterThanKnown gives the next checkpoint a length that the device state has no more, as after a device was unplugged.
func TestDeviceStateShorterThanKnown(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	records, err := filepath.Glob(filepath.Join(b.RecordDir, "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("session records %v, %v", records, err)
	}
	text, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	longer := regexp.MustCompile(`"streamBytes": \d+`).ReplaceAll(text, []byte(`"streamBytes": 100000`))
	if bytes.Equal(longer, text) {
		t.Fatalf("no length in the record:\n%s", text)
	}
	if err := os.WriteFile(records[0], longer, 0o600); err != nil {
		t.Fatal(err)
	}
	result, img := b.Capture(t.Context(), b.Options())
	b.Judge(t.Context(), result, img)
	if result.Source != "page tables" || result.Attempts != 2 {
		t.Errorf("taken by %q in %d attempts", result.Source, result.Attempts)
	}
	sound(t, b)
}

// TestManyProcessors takes a checkpoint with more compressors than there are buffers in the pool for the residue.
func TestManyProcessors(t *testing.T) {
	b := truth.NewBench(t, options())
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for _, n := range []int{16, 29, 64} {
		runtime.GOMAXPROCS(n)
		sound(t, b)
	}
}
