package restore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// stepsTouching are the steps after which a restore has to be repeated if it ends there.
var stepsTouching = Steps[slices.Index(Steps, StepMarked) : slices.Index(Steps, StepCompared)+1]

var errHook = errors.New("the test ends it here")

// small is a machine that a restore is through with in no time.
func small(v machine.Version) machine.Options {
	return machine.Options{QEMU: v, MemoryBytes: 64 * machine.MiB, Guest: writing()}
}

// A restore that fails at whatever step leaves the machine as it was, or standing and marked; and the next one finishes it.
func TestFailureAtEachStep(t *testing.T) {
	for _, v := range []machine.Version{machine.V72, machine.V10} {
		t.Run(string(v), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(v))
			img := r.capture(source, "base")
			twin := r.start(source.Twin())
			for _, step := range Steps[:slices.Index(Steps, StepMarked)] {
				o := r.options()
				o.Hooks.Step = failAt(step)
				if err := r.refused(twin, img, o); !errors.Is(err, errHook) {
					t.Errorf("at %q: %v", step, err)
				}
			}
			for _, step := range stepsTouching {
				o := r.options()
				o.Hooks.Step = failAt(step)
				_, err := Run(t.Context(), twin.target(), img, o)
				if !errors.Is(err, errHook) {
					t.Errorf("at %q: %v", step, err)
				}
				r.marked(twin, err)
				r.clean(twin)
			}
			r.restore(twin, img, r.options())
			r.goesOn(twin)
		})
	}
}

func failAt(step Step) func(Step) error {
	return func(s Step) error {
		if s == step {
			return errHook
		}
		return nil
	}
}

// clean wants nothing of a restore to be left in QEMU.
func (r *rig) clean(s *subject) {
	r.t.Helper()
	if n := r.leftovers(s); n > 0 {
		r.t.Errorf("%d memory files are left in QEMU", n)
	}
	for _, query := range []string{"query-jobs", "query-named-block-nodes"} {
		var left []json.RawMessage
		if err := s.Monitor.Execute(r.t.Context(), query, nil, &left); err != nil || len(left) > 0 {
			r.t.Errorf("%s: %v, %s", query, err, left)
		}
	}
}

// leftovers counts the memory files in QEMU.
func (r *rig) leftovers(s *subject) int {
	r.t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.PID))
	if err != nil {
		r.t.Fatal(err)
	}
	n := 0
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.Contains(to, carrierName) {
			n++
		}
	}
	return n
}

// In place, a machine that was stopped and not touched runs again.
func TestFailureBeforeAnythingIsTouchedLetsTheMachineGoOn(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V72))
	img := r.capture(source, "base")
	o := r.options()
	o.InPlace, o.Hooks.Step = true, failAt(StepStopped)
	if err := r.refused(source, img, o); !errors.Is(err, errHook) {
		t.Error(err)
	}
	r.goesOn(source)
}

// Something resumes every machine that it finds stopped, some milliseconds later, as virt-launcher does. The restore gives up
// before it has touched anything.
func TestResumedAfterItsStop(t *testing.T) {
	for _, delay := range []time.Duration{0, 15 * time.Millisecond, 60 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(machine.V10))
			img := r.capture(source, "base")
			stops := source.Monitor.Subscribe("STOP")
			defer stops.Close()
			go func() {
				if _, ok := <-stops.C; ok {
					time.Sleep(delay)
					source.Monitor.Execute(context.Background(), "cont", nil, nil)
				}
			}()
			o := r.options()
			o.InPlace = true
			if err := r.refused(source, img, o); !errors.Is(err, ErrResumed) {
				t.Error(err)
			}
			r.goesOn(source)
		})
	}
}

// Somebody resumes the machine in the middle of a restore: that ends, the machine is stopped again, and the next restore finishes it.
func TestResumedInTheMiddle(t *testing.T) {
	for _, step := range []Step{StepMarked, StepReset, StepMemory, StepArmed, StepLoaded, StepSettled, StepCompared} {
		t.Run(strings.ReplaceAll(string(step), " ", "-"), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(machine.V72))
			img := r.capture(source, "base")
			o := r.options()
			o.InPlace = true
			o.Hooks.Step = func(s Step) error {
				if s == step {
					return source.Continue(t.Context())
				}
				return nil
			}
			_, err := Run(t.Context(), source.target(), img, o)
			if !errors.Is(err, ErrResumed) {
				t.Error(err)
			}
			r.marked(source, err)
			r.restore(source, img, r.options())
			r.goesOn(source)
		})
	}
}

// Somebody migrates the machine in the middle of a restore: its half-written memory is kept from leaving.
func TestMigratedInTheMiddle(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	o := r.options()
	o.InPlace = true
	var writes atomic.Int32
	o.Hooks.Write = func(string, pageset.Run) error {
		if writes.Add(1) == 3 {
			// Nobody reads what it sends.
			return source.Monitor.Execute(t.Context(), "migrate", map[string]string{"uri": "exec:sleep 2"}, nil)
		}
		time.Sleep(5 * time.Millisecond)
		return nil
	}
	_, err := Run(t.Context(), source.target(), img, o)
	if !errors.Is(err, ErrMigrating) {
		t.Error(err)
	}
	r.marked(source, err)
	r.migrates(source, qemu.MigrationCancelled)
	r.restore(source, img, r.options())
	r.goesOn(source)
}

// One that was too fast is told of: there is no mark where the memory went.
func TestMigratedTooFast(t *testing.T) {
	m := new(commands)
	w := &watch{monitor: m, cancel: func(error) {}}
	for _, idle := range []qemu.MigrationStatus{"", qemu.MigrationNone, qemu.MigrationCancelled, qemu.MigrationCancelling, qemu.MigrationFailed} {
		if w.migrates(idle) || w.Err() != nil {
			t.Errorf("%q: %v", idle, w.Err())
		}
	}
	w.marked.Store(true)
	w.migrates(qemu.MigrationCompleted)
	if err := w.Err(); !errors.Is(err, ErrMigrating) || !strings.Contains(err.Error(), "must not run either") || !slices.Equal(*m, commands{"migrate_cancel"}) {
		t.Errorf("commands %v, then %v", *m, err)
	}
}

// commands is a monitor that notes them.
type commands []string

func (c *commands) Execute(_ context.Context, command string, _, _ any) error {
	*c = append(*c, command)
	return nil
}
func (c *commands) Subscribe(...string) *qemu.Subscription { return nil }
func (c *commands) Close() error                           { return nil }

func TestResumedWhileMemoryIsWritten(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	o := r.options()
	o.InPlace = true
	var writes atomic.Int32
	o.Hooks.Write = func(string, pageset.Run) error {
		if writes.Add(1) == 3 {
			return source.Continue(t.Context())
		}
		time.Sleep(5 * time.Millisecond)
		return nil
	}
	_, err := Run(t.Context(), source.target(), img, o)
	if !errors.Is(err, ErrResumed) {
		t.Error(err)
	}
	r.marked(source, err)
	r.restore(source, img, r.options())
	r.goesOn(source)
}

// The image is damaged after it was verified: the damage shows as an error, and the machine is not run.
func TestImageDamagedInTheMiddle(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V72))
	img := r.capture(source, "base")
	twin := r.start(source.Twin())
	files, err := filepath.Glob(filepath.Join(r.repoDir, "*", "base", "*.pages"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%q, %v", files, err)
	}
	flip := func() { // a bit in many places, as some of the file's frames are not used any more
		content, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		for at := 1000; at < len(content); at += 1000 {
			content[at] ^= 1
		}
		f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
	}
	o := r.options()
	o.Hooks.Step = func(s Step) error {
		if s == StepReset {
			flip()
		}
		return nil
	}
	_, err = Run(t.Context(), twin.target(), img, o)
	var damage *image.DamageError
	if !errors.As(err, &damage) {
		t.Error(err)
	}
	r.marked(twin, err)
	flip()
	r.restore(twin, img, r.options())
	r.goesOn(twin)
}

// What changes memory after the load is undone while it is settled, and fails the restore afterwards.
func TestMemoryWrittenBySomebodyElse(t *testing.T) {
	const gpa = writer.FirstGPA + 5*pageset.PageBytes + 8
	for _, tt := range []struct {
		step Step
		full bool
		fail bool
	}{
		{StepLoaded, false, false},
		{StepSettled, true, true},
	} {
		t.Run(string(tt.step), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(machine.V10))
			img := r.capture(source, "base")
			twin := r.start(source.Twin())
			o := r.options()
			o.FullCompare = tt.full
			o.Hooks.Step = func(s Step) error {
				if s == tt.step {
					return twin.WriteGuest(t.Context(), gpa, []byte("somebody else"))
				}
				return nil
			}
			if !tt.fail {
				result := r.restore(twin, img, o)
				if !slices.ContainsFunc(result.PutAgain, func(b BlockPages) bool { return b.Block == "pc.ram" && b.Pages == 1 }) {
					t.Errorf("put again: %v", result.PutAgain)
				}
				return
			}
			_, err := Run(t.Context(), twin.target(), img, o)
			var different *DifferenceError
			if !errors.As(err, &different) {
				t.Fatal(err)
			}
			t.Log(err)
			r.marked(twin, err)
			r.restore(twin, img, r.options())
			r.goesOn(twin)
		})
	}
}

// QEMU's main loop writes a page after what was written was taken and before tracking starts over: that page shows in no harvest, and is
// put right all the same.
func TestMemoryWrittenBetweenHarvestAndRearm(t *testing.T) {
	const gpa = writer.FirstGPA + 5*pageset.PageBytes + 8
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	twin := r.start(source.Twin())
	o := r.options()
	o.FullCompare = false // it would be found by that
	// Protection goes by spans: it takes a neighbour of a written page along.
	o.Hooks.Step = func(s Step) error {
		if s == StepLoaded {
			return twin.WriteGuest(t.Context(), gpa, []byte("before the harvest"))
		}
		return nil
	}
	var rounds int
	o.Hooks.Harvested = func() error {
		if rounds++; rounds == 1 {
			return twin.WriteGuest(t.Context(), gpa+pageset.PageBytes, []byte("after the harvest"))
		}
		return nil
	}
	result := r.restore(twin, img, o)
	if !slices.ContainsFunc(result.PutAgain, func(b BlockPages) bool { return b.Block == "pc.ram" && b.Pages == 2 }) {
		t.Errorf("put again: %v", result.PutAgain)
	}
	r.goesOn(twin)
}

// QEMU ends in the middle.
func TestQEMUDiesInTheMiddle(t *testing.T) {
	for _, step := range stepsTouching {
		t.Run(string(step), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(machine.V72))
			img := r.capture(source, "base")
			twin := r.start(source.Twin())
			o := r.options()
			o.Hooks.Step = func(s Step) error {
				if s == step {
					return twin.Kill()
				}
				return nil
			}
			begin := time.Now()
			if _, err := Run(t.Context(), twin.target(), img, o); !errors.Is(err, dirty.ErrGone) {
				t.Error(err)
			}
			if took := time.Since(begin); took > 15*time.Second {
				t.Errorf("it took %v to find out", took)
			}
			if n, err := Sweep(r.records); n != 0 || err != nil {
				t.Errorf("swept %d marks, %v", n, err)
			}
		})
	}
}

// A restore that is cancelled before the mark ends at once. After it the machine could not be used: the restore comes to its end.
func TestCancel(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V72))
	img := r.capture(source, "base")
	twin := r.start(source.Twin())
	for _, step := range Steps {
		ctx, cancel := context.WithCancel(t.Context())
		o := r.options()
		o.Run = step == StepUnmarked || step == StepRunning
		o.Hooks.Step = func(s Step) error {
			if s == step {
				cancel()
			}
			return nil
		}
		result, err := Run(ctx, twin.target(), img, o)
		cancel()
		marked := slices.Index(Steps, step) >= slices.Index(Steps, StepMarked)
		switch {
		case !marked && !errors.Is(err, context.Canceled):
			t.Errorf("cancelled at %q: %v", step, err)
		case marked && (err != nil || result.Resumed != o.Run):
			t.Errorf("cancelled at %q: %+v, %v", step, result, err)
		}
		if err := Invalid(r.records, twin.dirtyProcess()); err != nil {
			t.Errorf("cancelled at %q: %v", step, err)
		}
		r.clean(twin)
		if o.Run {
			if err := twin.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.goesOn(twin)
}

// Nor is a restore cut short by its caller while it writes memory; by somebody who resumes the machine it is, cancelled or not.
func TestCancelledWhileMemoryIsWritten(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	for _, resume := range []bool{true, false} {
		ctx, cancel := context.WithCancel(t.Context())
		o := r.options()
		o.InPlace = true
		var writes atomic.Int32
		o.Hooks.Write = func(string, pageset.Run) error {
			switch n := writes.Add(1); {
			case n == 3:
				cancel()
			case n == 5 && resume:
				return source.Continue(t.Context())
			}
			time.Sleep(5 * time.Millisecond)
			return nil
		}
		_, err := Run(ctx, source.target(), img, o)
		cancel()
		if !resume {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if !errors.Is(err, ErrResumed) {
			t.Error(err)
		}
		r.marked(source, err)
	}
	r.judge(source, img)
	r.goesOn(source)
}

// childVariable makes the test binary a restore that kills itself at a step: its value is a childRequest.
const childVariable = "VMCKPT_RESTORE_TEST_CHILD"

type childRequest struct {
	Repository, Image, Records, Socket string
	PID                                int
	Step                               Step // "" to be killed at the Write-th write
	Write                              int32
	InPlace                            bool
}

// TestKilledAtEachStep has restores killed with -9, one after the other, in the same machine. The last one finishes.
func TestKilledAtEachStep(t *testing.T) {
	for _, v := range []machine.Version{machine.V72, machine.V10} {
		t.Run(string(v), func(t *testing.T) {
			r := newRig(t)
			source := r.start(small(v))
			img := r.capture(source, "base")
			m := r.startUnconnected(source.Twin())
			process, err := qemu.Find(t.Context(), qemu.Selector{PID: m.PID})
			if err != nil {
				t.Fatal(err)
			}
			twin := &subject{Machine: m, process: process}
			request := childRequest{Repository: r.repoDir, Image: "base", Records: r.records, Socket: m.Socket, PID: m.PID}
			for _, step := range Steps[:slices.Index(Steps, StepUnmarked)] {
				request.Step = step
				r.killed(request)
				err := Invalid(r.records, twin.dirtyProcess())
				if touched := slices.Index(Steps, step) >= slices.Index(Steps, StepMarked); touched != (err != nil) {
					t.Errorf("killed at %q: %v", step, err)
				}
				if state := r.state(twin); state == qemu.StateRunning {
					t.Errorf("killed at %q: the machine is %s", step, state)
				}
			}
			request.Step = ""
			for _, request.Write = range []int32{1, 7, 20} {
				r.killed(request)
			}
			if twin.monitor, err = qemu.DialUnix(t.Context(), m.Socket); err != nil {
				t.Fatal(err)
			}
			defer twin.monitor.Close()
			r.restore(twin, img, r.options())
			r.clean(twin)
			r.goesOn(twin)
		})
	}
}

func (r *rig) startUnconnected(o machine.Options) *machine.Machine {
	r.t.Helper()
	return machine.Start(r.t, o)
}

// killed runs a restore in a process of its own, which kills itself.
func (r *rig) killed(request childRequest) {
	r.t.Helper()
	text, err := json.Marshal(request)
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.CommandContext(r.t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"="+string(text))
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		r.t.Errorf("the restore to be killed at %q (write %d) ended with %v\n%s", request.Step, request.Write, err, output.String())
	}
}

func runChild() {
	err := func() error {
		var request childRequest
		if err := json.Unmarshal([]byte(os.Getenv(childVariable)), &request); err != nil {
			return err
		}
		ctx := context.Background()
		repo, err := image.OpenRepository(request.Repository, testKeys)
		if err != nil {
			return err
		}
		img, err := repo.Open(ctx, request.Image)
		if err != nil {
			return err
		}
		process, err := qemu.Find(ctx, qemu.Selector{PID: request.PID})
		if err != nil {
			return err
		}
		monitor, err := qemu.DialUnix(ctx, request.Socket)
		if err != nil {
			return err
		}
		die := func() { unix.Kill(os.Getpid(), unix.SIGKILL) }
		var writes atomic.Int32
		o := Options{RecordDir: request.Records, InPlace: request.InPlace}
		o.Hooks.Step = func(s Step) error {
			if s == request.Step {
				die()
			}
			return nil
		}
		o.Hooks.Write = func(string, pageset.Run) error {
			if request.Step == "" && writes.Add(1) == request.Write {
				die()
			}
			return nil
		}
		_, err = Run(ctx, Target{Process: process, Monitor: monitor}, img, o)
		return fmt.Errorf("not killed: %w", err)
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// A restore killed with -9 between its stop and the mark leaves a note; whoever sees it die lets the machine go on, where that is ours to do.
func TestKilledAfterItsStop(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	r.capture(source, "base")
	source.monitor.Close()
	request := childRequest{Repository: r.repoDir, Image: "base", Records: r.records, Socket: source.Socket, PID: source.PID, Step: StepStopped, InPlace: true}
	killed := func() {
		t.Helper()
		r.killed(request)
		if state := r.state(source); state != qemu.StatePaused {
			t.Fatalf("the machine is %s", state)
		}
	}
	mend := func() error {
		m, err := qemu.DialUnix(t.Context(), source.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		return Continue(t.Context(), Target{Process: source.process, Monitor: m}, r.records)
	}
	noted := func() bool {
		stop, err := LeftStopped(r.records, source.dirtyProcess())
		if err != nil {
			t.Error(err)
		}
		stops, err := Stops(r.records)
		if err != nil || len(stops) != 0 != (stop != nil) {
			t.Errorf("all notes: %v, %v", stops, err)
		}
		return stop != nil
	}

	killed()
	if !noted() {
		t.Error("nothing says that the restore stopped the machine")
	}
	if err := mend(); err != nil {
		t.Error(err)
	}
	if state := r.state(source); state != qemu.StateRunning || noted() {
		t.Errorf("continued, the machine is %s, noted: %v", state, noted())
	}
	r.goesOn(source)

	// One that its owner has paused since is not woken.
	if err := source.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := mend(); err != nil {
		t.Error(err)
	}
	if state := r.state(source); state != qemu.StatePaused {
		t.Errorf("a machine that its owner paused is %s", state)
	}
	r.goesOn(source)

	// Nor one that goes elsewhere.
	killed()
	if err := source.Monitor.Execute(t.Context(), "migrate", map[string]string{"uri": "exec:sleep 10"}, nil); err != nil {
		t.Fatal(err)
	}
	r.migrates(source, qemu.MigrationActive)
	if err := mend(); err == nil || !strings.Contains(err.Error(), "migration") {
		t.Errorf("while it migrates: %v", err)
	}
	if state := r.state(source); state == qemu.StateRunning {
		t.Error("a machine that migrates was woken")
	}
	if err := source.Monitor.Execute(t.Context(), "migrate_cancel", nil, nil); err != nil {
		t.Fatal(err)
	}
	r.migrates(source, qemu.MigrationCancelled)

	// A machine that was seen to run since needs no note.
	r.goesOn(source)
	m, err := qemu.DialUnix(t.Context(), source.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := Admit(t.Context(), Target{Process: source.process, Monitor: m}, r.records); err != nil || noted() {
		t.Errorf("after it was admitted: %v, noted: %v", err, noted())
	}
}

// A restore that has stopped the machine and cannot let it go on says so, whatever ended it.
func TestStoppedAndNotContinued(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := r.options()
	o.InPlace = true
	o.Hooks.Step = func(s Step) error {
		if s != StepStopped {
			return nil
		}
		cancel()
		if err := source.Monitor.Execute(t.Context(), "migrate", map[string]string{"uri": "exec:sleep 10"}, nil); err != nil {
			t.Error(err)
		}
		r.migrates(source, qemu.MigrationActive)
		return ctx.Err()
	}
	_, err := Run(ctx, source.target(), img, o)
	var stopped *StoppedError
	if !errors.As(err, &stopped) || !errors.Is(err, context.Canceled) && !errors.Is(err, ErrMigrating) || !strings.Contains(err.Error(), "not continued: a migration is active") {
		t.Errorf("the restore ended with: %v", err)
	}
	if stop, err := LeftStopped(r.records, source.dirtyProcess()); stop == nil || err != nil {
		t.Errorf("the note: %v, %v", stop, err)
	}
}

// What goes wrong after the memory is whole is told as that.
func TestRestoredAndNotRunning(t *testing.T) {
	r := newRig(t)
	source := r.start(small(machine.V10))
	img := r.capture(source, "base")
	o := r.options()
	o.InPlace, o.Run = true, true
	o.Hooks.Step = failAt(StepUnmarked)
	_, err := Run(t.Context(), source.target(), img, o)
	var restored *RestoredError
	if !errors.As(err, &restored) {
		t.Error(err)
	}
	if err := Invalid(r.records, source.dirtyProcess()); err != nil {
		t.Error(err)
	}
	if state := r.state(source); state != qemu.StatePaused {
		t.Errorf("the machine is %s", state)
	}
	r.judge(source, img)
	r.goesOn(source)

	// Somebody who is faster does what was to be done.
	o.Hooks.Step = func(s Step) error {
		if s == StepUnmarked {
			return source.Continue(t.Context())
		}
		return nil
	}
	if result, err := Run(t.Context(), source.target(), img, o); err != nil || !result.Resumed {
		t.Errorf("continued by somebody else: %+v, %v", result, err)
	}
	r.goesOn(source)
}
