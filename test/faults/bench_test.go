package faults

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

var (
	repeat = flag.Int("repeat", 1, "how often each fault is tried; the steps between scan and seal twice as often")
	accel  = flag.String("accel", "", "what runs the guests: kvm or tcg; default KVM where there is one")
)

// accelerator is what runs the guests.
func accelerator() machine.Accel {
	switch {
	case *accel != "":
		return machine.Accel(*accel)
	case machine.UsableAccel(machine.KVM) == nil:
		return machine.KVM
	}
	return machine.TCG
}

// options are those of a small machine that writes all the time.
func options() machine.Options {
	return machine.Options{QEMU: machine.V10, Accel: accelerator(), MemoryBytes: 32 * machine.MiB, Guest: machine.Writer{
		Percent: 60, Parameters: writer.Parameters{Random: true, Whole: true, PagesPerPass: 64, Spin: 100_000, DMAPagesPerPass: 1},
	}}
}

// early are the steps of the rounds, which only a capture without tracking is sure to go through.
var early = []capture.Step{capture.StepHarvested, capture.StepBarrier, capture.StepCopied}

// guarding are the steps of a guard, which only a capture with much to copy is sure to go through, if it does not copy it beforehand.
var guarding = []capture.Step{capture.StepLent, capture.StepGuarded, capture.StepKept, capture.StepConfirmed, capture.StepTaken, capture.StepUnguarded}

// through are the options of the next capture, one that goes through the step.
func through(b *truth.Bench, step capture.Step) capture.Options {
	o := b.Options()
	switch {
	case slices.Contains(early, step):
		o.Mode = capture.Full
	case slices.Contains(guarding, step):
		o.Mode, o.Instant, o.ResidueBudget = capture.Full, capture.Early, time.Microsecond
	}
	return o
}

// before says whether a step comes before another.
func before(step, other capture.Step) bool {
	return slices.Index(capture.Steps, step) < slices.Index(capture.Steps, other)
}

// sound asks what must hold after every fault.
func sound(t *testing.T, b *truth.Bench) {
	t.Helper()
	b.T = t
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	goesOn(t, b.Machine)
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
	goesOn(t, b.Machine)
}

// goesOn makes sure that the guest runs, and has found no fault of its own in its memory.
func goesOn(t *testing.T, m *machine.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var err error
	if guest, linux := m.Options().Guest.(machine.Linux); linux {
		err = counts(ctx, m, guest)
	} else {
		err = writes(ctx, m)
	}
	if err != nil {
		state, _ := qemu.Status(t.Context(), m.Monitor) //nolint:errcheck // for the message
		t.Fatalf("the guest does not go on (state %q): %v", state, err)
	}
}

// writes waits until the bare-metal guest has made another pass.
func writes(ctx context.Context, m *machine.Machine) error {
	begin, begun, err := m.WriterStatus(ctx)
	if err != nil || !begun {
		return fmt.Errorf("its account of its work: %+v, begun %v: %w", begin, begun, err)
	}
	now, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > begin.Passes+1 })
	if err == nil && now.Errors > 0 {
		err = fmt.Errorf("it found faults in its memory: %+v", now)
	}
	return err
}

// counts waits until the Linux guest has counted on, with the buffer that belongs to the count.
func counts(ctx context.Context, m *machine.Machine, guest machine.Linux) error {
	lines, err := m.Serial.Lines()
	if err != nil {
		return err
	}
	var last uint64
	for n, from := 0, len(lines); n < 3; n++ { // the first line may have been on its way
		var now workload.State
		_, at, err := m.Serial.WaitLine(ctx, from, func(line string) (ok bool) {
			now, ok = workload.ParseState(line)
			return ok
		})
		switch {
		case err != nil:
			return err
		case !now.OK || now.Hash != guest.Counter().Hash(now.Count):
			return fmt.Errorf("its memory is not what it left there: %v", now)
		case now.Count <= last:
			return fmt.Errorf("it counts %d after %d", now.Count, last)
		}
		last, from = now.Count, at+1
	}
	return nil
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
