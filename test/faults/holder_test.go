package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// hangVariable names the file in which a holder of a leash says that it hangs. It makes one that hangs at a signal: it neither reads nor
// exits, as one does that waits for itself.
const hangVariable = "VMCKPT_FAULTS_HANG"

// lateVariable names a file whose presence makes the next holder stop before it is armed.
const lateVariable = "VMCKPT_FAULTS_LATE"

const (
	hang          = unix.SIGUSR1
	hangUntimed   = unix.SIGUSR2 // and the kernel's timer is gone, so that nobody but the worker watches it
	hangTimers    = 16           // a process's timers are numbered from 0
	hangOneThread = "asyncpreemptoff=1"
	hungBytes     = 1  // the length of the file of one that hangs
	hungSeconds   = 30 // of processor time that one may take
)

// beReadyToHang makes a holder one that can hang. With one processor for all goroutines, and none of them interrupted, one that spins
// leaves none for those that serve the leash.
func beReadyToHang() {
	if os.Getenv("VMCKPT_LEASH_HOLD_AT_BYTES") == "" {
		return
	}
	if path := os.Getenv(lateVariable); path != "" && os.Remove(path) == nil {
		unix.Kill(os.Getpid(), unix.SIGSTOP) //nolint:errcheck // the test shows
	}
	path := os.Getenv(hangVariable)
	if path == "" {
		return
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, hang, hangUntimed)
	go func() {
		untimed := <-signals == hangUntimed
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		fd := file.Fd()
		// Should the worker not end it, the kernel does, some time.
		if err := unix.Setrlimit(unix.RLIMIT_CPU, &unix.Rlimit{Cur: hungSeconds, Max: hungSeconds}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		// From here on no system call that the scheduler knows of: it would hand the processor on.
		if untimed {
			for id := range uintptr(hangTimers) {
				unix.RawSyscall(unix.SYS_TIMER_DELETE, id, 0, 0)
			}
		}
		unix.RawSyscall(unix.SYS_FTRUNCATE, fd, hungBytes, 0)
		for turns := uint64(1); turns != 0; turns++ {
		}
	}()
}

// blow is what a holder of a leash suffers.
type blow struct {
	name   string
	signal unix.Signal
	struck func(pid int) bool // it shows

	// The guest comes free by the end of a bound, but where the leash is gone at once.
	bound time.Duration
}

// blows returns all kinds. Holders that are started in the test from now on can hang.
func blows(t *testing.T) (killed, stopped, hung, untimed blow) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hangs")
	t.Setenv(hangVariable, path)
	t.Setenv("GODEBUG", hangOneThread)
	hangs := func(int) bool {
		info, err := os.Stat(path)
		return err == nil && info.Size() == hungBytes && os.Remove(path) == nil
	}
	return blow{"killed", unix.SIGKILL, ended, 0},
		blow{"stopped", unix.SIGSTOP, func(pid int) bool { return state(pid) == 'T' }, holdBound},
		blow{"hung", hang, hangs, holdBound},
		// Once the worker has let the machine go itself, it gives the holder two seconds to do so.
		blow{"hung without its timer", hangUntimed, hangs, 2 * time.Second}
}

// strike hits the holder of this process, and waits until that shows.
func (bl blow) strike() error {
	pid, err := holder(os.Getpid())
	if err != nil {
		return err
	}
	if err := unix.Kill(pid, bl.signal); err != nil {
		return fmt.Errorf("send %v to holder %d: %w", bl.signal, pid, err)
	}
	if !within(5*time.Second, func() bool { return bl.struck(pid) }) {
		return fmt.Errorf("holder %d was to be %s; its state is %c", pid, bl.name, state(pid))
	}
	return nil
}

// holdBound is that of a machine whose holder suffers: long enough for the test to look at all memory.
const holdBound = 500 * time.Millisecond

// holderSuffers strikes the holder once, when a capture comes to the step for the first time. That standstill is lost, the guest comes
// free within the bound, and the next one holds.
func holderSuffers(t *testing.T, b *truth.Bench, bl blow, o capture.Options, step capture.Step, standstill string) {
	t.Helper()
	b.T = t
	o.HoldBound = holdBound
	var came bool
	var missed error
	o.Hooks.Step = func(at capture.Step) {
		if at == step && !came {
			came = true
			missed = bl.strike()
		}
	}
	result, img := b.Capture(t.Context(), o)
	switch {
	case !came:
		t.Errorf("the step %q never came", step)
	case missed != nil:
		t.Error(missed)
	}
	b.Judge(t.Context(), result, img)

	var lost, held []capture.Pause
	for _, p := range result.Pauses {
		switch {
		case p.For != standstill:
		case p.Lost:
			lost = append(lost, p)
			if len(held) > 0 {
				t.Errorf("the %s that was lost is not the first", standstill)
			}
		default:
			held = append(held, p)
		}
	}
	attempts := 1
	if standstill == "instant" {
		attempts = 2
	}
	if result.Attempts != attempts || len(lost) != 1 || len(held) == 0 {
		t.Errorf("%d attempts, %d of %s lost and %d held; want %d attempts, one lost and one held", result.Attempts, len(lost), standstill, len(held), attempts)
	}
	bound := bl.bound + slack
	for _, p := range lost {
		t.Logf("lost: the guest stood still for %v (by QEMU's stamps: %v)", p.Total, p.Exact)
		if p.Total > bound {
			t.Errorf("the guest stood still for %v, want %v at the most", p.Total, bound)
		}
	}
	sound(t, b)
}

// inHold are the steps at which the machine is held.
var inHold = []capture.Step{capture.StepHeld, capture.StepScanned, capture.StepKept, capture.StepResidue, capture.StepRearmed}

// TestHolder kills, stops and hangs the leash's holder at each step of a hold.
func TestHolder(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	killed, stopped, hung, untimed := blows(t)
	around := slices.Concat([]capture.Step{capture.StepArmed, capture.StepSent}, inHold, []capture.Step{capture.StepReleased})
	for _, c := range []struct {
		blow  blow
		steps []capture.Step
	}{
		{killed, around},
		{stopped, around},
		{hung, around[:len(around)-1]},
		{untimed, []capture.Step{capture.StepArmed, capture.StepRearmed}},
	} {
		for range *repeat {
			for _, step := range c.steps {
				t.Run(fmt.Sprintf("%s/%s", c.blow.name, step), func(t *testing.T) {
					holderSuffers(t, b, c.blow, through(b, step), step, "instant")
				})
			}
		}
	}
	// The standstill of the barrier comes first where a capture goes through rounds. It is read through, not held.
	for _, c := range []struct {
		blow blow
		step capture.Step
	}{{killed, capture.StepArmed}, {killed, capture.StepSent}, {stopped, capture.StepSent}, {hung, capture.StepArmed}} {
		t.Run(fmt.Sprintf("%s/barrier/%s", c.blow.name, c.step), func(t *testing.T) {
			holderSuffers(t, b, c.blow, through(b, capture.StepBarrier), c.step, "barrier")
		})
	}
}

// TestHolderNeverReady: a holder that stops before it is armed is given up, and another one holds. The guest runs meanwhile.
func TestHolderNeverReady(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	path := filepath.Join(t.TempDir(), "late")
	t.Setenv(lateVariable, path)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	result, img := b.Capture(ctx, b.Options())
	b.Judge(ctx, result, img)
	t.Logf("%d attempts, %v", result.Attempts, result.Duration)
	if _, err := os.Stat(path); err == nil || result.Attempts != 2 {
		t.Errorf("%d attempts, want that the first one had no holder (%v)", result.Attempts, err)
	}
	if result.Downtime > slack {
		t.Errorf("the guest stood still for %v", result.Downtime)
	}
	sound(t, b)
}

// TestHolderKilledAlways lets no attempt succeed.
func TestHolderKilledAlways(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	killed, _, _, _ := blows(t)
	for _, c := range []struct {
		mode capture.Mode
		step capture.Step
	}{
		{capture.Auto, capture.StepScanned},
		{capture.Full, capture.StepArmed}, // of the barrier, which is never passed
	} {
		t.Run(string(c.step), func(t *testing.T) {
			b.T = t
			o := b.Options()
			o.Mode = c.mode
			strikes := 0
			o.Hooks.Step = func(at capture.Step) {
				if at != c.step {
					return
				}
				strikes++
				if err := killed.strike(); err != nil {
					t.Error(err)
				}
			}
			_, err := capture.Run(t.Context(), b.Target, b.Repository, o)
			var attempts *capture.AttemptsError
			if !errors.As(err, &attempts) || attempts.Attempts != strikes || strikes < 2 {
				t.Errorf("error %v after %d strikes, want that none of as many attempts held", err, strikes)
			}
			sound(t, b)
		})
	}
}

// TestHoldBoundTooShort: a bound that no hold keeps is what the error names, and the machine goes on.
func TestHoldBoundTooShort(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	o := b.Options()
	o.HoldBound = 50 * time.Microsecond
	_, err := capture.Run(t.Context(), b.Target, b.Repository, o)
	var bound *capture.BoundError
	var attempts *capture.AttemptsError
	if !errors.As(err, &bound) || bound.Bound != o.HoldBound || !errors.As(err, &attempts) || strings.Count(err.Error(), "let go") != 1 {
		t.Errorf("error %v, want that the bound of %v was too short", err, o.HoldBound)
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
	again, struck := 0, 0
	for range 6 * *repeat {
		o := b.Options()
		o.Mode, o.HoldBound, o.PauseBound = capture.Full, 20*time.Second, 30*time.Second
		hit := false
		o.Hooks.Step = func(at capture.Step) {
			if at != capture.StepResidue || hit {
				return
			}
			hit = true
			pid, err := holder(os.Getpid())
			if err != nil {
				t.Error(err)
				return
			}
			struck++
			time.AfterFunc(time.Duration(rand.Int64N(int64(6*time.Millisecond))), func() { unix.Kill(pid, unix.SIGKILL) }) //nolint:errcheck // it may have ended
		}
		result, img := b.Capture(t.Context(), o)
		b.Judge(t.Context(), result, img)
		if result.Attempts > 1 {
			again++
		}
	}
	t.Logf("%d of %d holders were killed, %d attempts were lost", struck, 6**repeat, again)
	if struck == 0 || again == 0 {
		t.Error("none was killed in time")
	}
	sound(t, b)
}
