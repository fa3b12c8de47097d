package faults

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
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

// early are the steps of the rounds, which only a capture without tracking goes through.
var early = []capture.Step{capture.StepHarvested, capture.StepBarrier, capture.StepCopied}

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

// TestMigration starts a migration at every step of a checkpoint: one that goes on and on, and is cancelled, and, in the steps of the
// instant, one that ends.
func TestMigration(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		begin := func(t *testing.T) *truth.Bench {
			o := options()
			o.QEMU, o.Accel = version, machine.TCG
			b := truth.NewBench(t, o)
			b.Capture(t.Context(), b.Options())
			return b
		}
		t.Run(fmt.Sprintf("%s/cancelled", version), func(t *testing.T) {
			b := begin(t)
			for _, step := range capture.Steps {
				if slices.Contains(early, step) {
					continue // they come in a capture without tracking alone
				}
				t.Run(string(step), func(t *testing.T) {
					b.T = t
					migrate(t, b, step, false)
				})
			}
		})
		for _, step := range []capture.Step{capture.StepArmed, capture.StepSent, capture.StepHeld, capture.StepResidue, capture.StepReleased, capture.StepSealing} {
			t.Run(fmt.Sprintf("%s/ends/%s", version, step), func(t *testing.T) { migrate(t, begin(t), step, true) })
		}
	}
}

func migrate(t *testing.T, b *truth.Bench, step capture.Step, ends bool) {
	bandwidth := 64 << 10
	if ends {
		bandwidth = 1 << 30
	}
	execute := func(command string, args any) error {
		return b.Machine.Monitor.Execute(t.Context(), command, args, nil)
	}
	if err := execute("migrate-set-parameters", map[string]any{"max-bandwidth": bandwidth, "downtime-limit": 2000}); err != nil {
		t.Fatal(err)
	}
	o := b.Options()
	started := make(chan error, 1)
	begun := false
	o.Hooks.Step = func(at capture.Step) {
		if at == step && !begun {
			begun = true
			// In a hold it waits for its end, like everybody.
			go func() { started <- execute("migrate", map[string]any{"uri": "exec:cat >/dev/null"}) }()
			time.Sleep(2 * time.Millisecond)
		}
	}
	result, captured := capture.Run(t.Context(), b.Target, b.Repository, o)
	if err := <-started; err != nil {
		t.Fatalf("migrate: %v", err)
	}
	t.Logf("the checkpoint: %v", captured)
	if captured == nil {
		img, err := b.Repository.Open(t.Context(), o.Name)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		b.Judge(t.Context(), result, img)
	} else if !errors.Is(captured, capture.ErrMigrating) && !errors.Is(captured, capture.ErrStopped) {
		t.Errorf("error %v, want that it is migrating", captured)
	}
	if !ends {
		if err := execute("migrate_cancel", nil); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		m, err := qemu.Migration(t.Context(), b.Machine.Monitor)
		if err != nil {
			t.Fatal(err)
		}
		if m.Status == qemu.MigrationCompleted || m.Status == qemu.MigrationCancelled || m.Status == qemu.MigrationFailed {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the migration hangs in %q", m.Status)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !ends {
		sound(t, b)
		return
	}
	// It has moved away: nothing of ours may wake it here.
	time.Sleep(50 * time.Millisecond)
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePostMigrate {
		t.Errorf("the machine that has migrated away is %q, %v", state, err)
	}
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a machine that has migrated away: error %v", err)
	}
}

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

// TestVolumeFull lets the volume run full in the middle.
func TestVolumeFull(t *testing.T) {
	larger := options()
	larger.MemoryBytes = 64 * machine.MiB
	b := truth.NewBench(t, larger)
	small := t.TempDir()
	if err := unix.Mount("none", small, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("mounting a small volume: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) }) //nolint:errcheck // it goes with the machine else
	dir := filepath.Join(small, "repository")
	if err := image.InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	full, err := image.OpenRepository(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Machine.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > 40_000 }); err != nil {
		t.Fatal(err)
	}
	o := b.Options()
	o.Compression = image.None
	_, err = capture.Run(t.Context(), b.Target, full, o)
	var space *image.SpaceError
	if !errors.As(err, &space) {
		t.Errorf("error %v, want that the volume is full", err)
	}
	for _, where := range []string{"tmp", "images"} {
		if left, err := os.ReadDir(filepath.Join(dir, where)); err != nil || len(left) > 0 {
			t.Errorf("left in %s of the full volume: %v, %v", where, left, err)
		}
	}
	sound(t, b)
}

// TestParentGone deletes or damages the image that the next one was to be made on.
func TestParentGone(t *testing.T) {
	for _, c := range []struct {
		name   string
		verify bool // only a look at every byte finds it
		damage func(t *testing.T, dir string)
	}{
		{"deleted", false, func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}},
		{"manifest", false, func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "manifest.json"), 100) }},
		{"index", false, func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "index"), 100) }},
		{"pages cut short", false, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.pages"))
			if err != nil || len(files) == 0 {
				t.Fatalf("data files %v, %v", files, err)
			}
			if err := os.Truncate(files[0], 1000); err != nil {
				t.Fatal(err)
			}
		}},
		// Found when the first page is compared with it, with the machine's instant over.
		{"hashes", false, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.hashes"))
			if err != nil || len(files) == 0 {
				t.Fatalf("hash files %v, %v", files, err)
			}
			content, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			for at := 100; at < len(content); at += 1000 {
				flip(t, files[0], at)
			}
		}},
		{"a page", true, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.pages"))
			if err != nil || len(files) == 0 {
				t.Fatalf("data files %v, %v", files, err)
			}
			flip(t, files[0], 70_000)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := truth.NewBench(t, options())
			b.Capture(t.Context(), b.Options())
			c.damage(t, filepath.Join(b.Dir, "images", b.Names[0]))

			o := b.Options()
			o.Mode, o.VerifyParent = capture.Incremental, c.verify
			if _, err := capture.Run(t.Context(), b.Target, b.Repository, o); err == nil {
				t.Error("an increment was made on a parent that is gone")
			}
			o = b.Options()
			o.VerifyParent = c.verify
			result, img := b.Capture(t.Context(), o)
			b.Judge(t.Context(), result, img)
			if err := img.Verify(t.Context(), nil); err != nil {
				t.Error(err)
			}
			t.Logf("%s", result.Why)
			if result.Parent != "" || !strings.HasPrefix(result.Why, "a base") {
				t.Errorf("parent %q, why %q; want a base that says why it is one", result.Parent, result.Why)
			}
			result, img = b.Capture(t.Context(), b.Options())
			b.Judge(t.Context(), result, img)
			if result.Source != "page tables" {
				t.Errorf("the one after it is by %q: %s", result.Source, result.Why)
			}
		})
	}
}

func flip(t *testing.T, file string, at int) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(content)
	changed[at] ^= 1
	if err := os.WriteFile(file, changed, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestStates: a machine that never ran is refused, and left as it is.
func TestStates(t *testing.T) {
	o := options()
	o.Paused = true
	b := truth.NewBench(t, o)
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a machine that was never started: error %v", err)
	}
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePrelaunch {
		t.Errorf("it is %q, %v", state, err)
	}
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
