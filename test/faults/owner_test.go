package faults

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestResumedByOthers has somebody resume the machine whenever it stands, as virt-launcher does, and without even looking.
func TestResumedByOthers(t *testing.T) {
	b := truth.NewBench(t, options())
	img := resumedByOthers(t, b, 10**repeat, b.Machine.Continue)
	sound(t, b)
	restored(t, machine.Start(t, b.Machine.Twin()), img)
}

// resumedByOthers takes n checkpoints while somebody resumes the machine all the time, and returns the last one.
func resumedByOthers(t *testing.T, b *truth.Bench, n int, resume func(context.Context) error) *image.Image {
	t.Helper()
	b.T = t
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var resumed atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if resume(ctx) == nil {
				resumed.Add(1)
			}
			time.Sleep(time.Millisecond)
		}
	}()
	var last *image.Image
	for range n {
		result, img := b.Capture(t.Context(), b.Options())
		b.Judge(t.Context(), result, img)
		last = img
	}
	cancel()
	<-done
	t.Logf("it was resumed %d times", resumed.Load())
	if resumed.Load() == 0 {
		t.Error("nobody resumed it")
	}
	return last
}

// restored puts an image into a machine that stands still, and lets its guest go on where the captured one was.
func restored(t *testing.T, twin *machine.Machine, img *image.Image) {
	t.Helper()
	process, err := qemu.Find(t.Context(), qemu.Selector{PID: twin.PID})
	if err != nil {
		t.Fatal(err)
	}
	monitor, err := twin.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	target := restore.Target{Process: process, Monitor: monitor}
	if _, err := restore.Run(t.Context(), target, img, restore.Options{RecordDir: t.TempDir(), FullCompare: true, Run: true}); err != nil {
		t.Fatal(err)
	}
	// The guest looks at every page before it writes it again; after that many passes it has seen most of them.
	const passes = 100
	if _, writes := twin.Options().Guest.(machine.Writer); writes {
		begin, begun, err := twin.WriterStatus(t.Context())
		if err != nil || !begun {
			t.Fatalf("the guest's account of its work in restored memory: %+v, begun %v, %v", begin, begun, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := twin.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > begin.Passes+passes }); err != nil {
			t.Fatal(err)
		}
	}
	goesOn(t, twin)
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
	for _, step := range []capture.Step{capture.StepSent, capture.StepHeld, capture.StepRearmed} {
		err := doom(t, b, doomed{Options: b.Options(), At: step, Signal: unix.SIGKILL}, supervise.Options{})
		var died *supervise.DiedError
		if !errors.As(err, &died) {
			t.Fatalf("the worker was to be killed at %q; it ended with %v", step, err)
		}
		// QEMU may still be at the end of the command.
		time.Sleep(20 * time.Millisecond)
		if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePaused {
			t.Fatalf("the machine that its owner paused is %q after a worker was killed at %q, %v", state, step, err)
		}
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
		t.Run(string(step), func(t *testing.T) {
			b.T = t
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := through(b, step)
			came := false
			o.Hooks.Step = func(at capture.Step) {
				if at == step {
					came = true
					cancel()
				}
			}
			result, err := capture.Run(ctx, b.Target, b.Repository, o)
			switch {
			case !came:
				t.Errorf("the step %q never came", step)
			case err == nil && before(step, capture.StepReleased):
				t.Error("a checkpoint that nobody wanted any more")
			case err != nil && !errors.Is(err, context.Canceled):
				t.Errorf("error %v", err)
			case err == nil:
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
