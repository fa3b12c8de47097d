package faults

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

var repeat = flag.Int("repeat", 1, "how often each fault is tried; the steps between scan and seal four times as often")

// options are those of a small machine that writes all the time.
func options() machine.Options {
	return machine.Options{QEMU: machine.V10, Accel: machine.KVM, MemoryBytes: 32 * machine.MiB, Guest: machine.Writer{
		Percent: 60, Parameters: writer.Parameters{Random: true, Whole: true, PagesPerPass: 64, Spin: 100_000, DMAPagesPerPass: 1},
	}}
}

// early are the steps of the rounds, which only a capture without tracking goes through.
var early = []capture.Step{capture.StepHarvested, capture.StepBarrier, capture.StepCopied}

// sound asks what must hold after every fault.
func sound(t *testing.T, b *truth.Bench) {
	t.Helper()
	b.T = t
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	goesOn(t, b)
	if _, err := b.Repository.Sweep(ctx, 0); err != nil {
		t.Errorf("sweep: %v", err)
	}
	wholeImages(t, b)
	o := b.Options()
	result, img := b.Capture(ctx, o)
	b.Judge(ctx, result, img)
	if err := img.Verify(ctx, nil); err != nil {
		t.Error(err)
	}
	goesOn(t, b)
}

// goesOn makes sure that the guest runs, and has found no fault of its own in its memory.
func goesOn(t *testing.T, b *truth.Bench) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	before, _, err := b.Machine.WriterStatus(ctx)
	if err != nil {
		t.Fatal(err)
	}
	after, err := b.Machine.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > before.Passes+1 })
	if err != nil {
		state, _ := qemu.Status(ctx, b.Machine.Monitor) //nolint:errcheck // for the message
		t.Fatalf("the guest does not go on (state %q): %v", state, err)
	}
	if after.Errors > 0 {
		t.Fatalf("the guest found faults in its memory: %+v", after)
	}
}

// wholeImages makes sure that the repository holds the images that were made, whole, and nothing else.
func wholeImages(t *testing.T, b *truth.Bench) {
	t.Helper()
	images, err := b.Repository.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range images {
		if s.Err != nil {
			t.Errorf("image %s: %v", s.Name, s.Err)
		}
	}
	left, err := os.ReadDir(filepath.Join(b.Dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left in the repository: %v", left)
	}
}
