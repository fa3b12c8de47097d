package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// migration is one that the test has going on beside a capture. It is slow until it is let go, so that where it stands is the test's to say.
type migration struct {
	t *testing.T
	b *truth.Bench
}

// slowBytes is a bandwidth with which no migration of these machines ends, in bytes per second; fastBytes one with which it does at once.
const (
	slowBytes = 64 << 10
	fastBytes = 4 << 30
)

func (m *migration) execute(command string, args any) error {
	ctx, cancel := context.WithTimeout(m.t.Context(), 20*time.Second)
	defer cancel()
	return m.b.Machine.Monitor.Execute(ctx, command, args, nil)
}

func (m *migration) bandwidth(bytesPerSecond int) error {
	return m.execute("migrate-set-parameters", map[string]any{"max-bandwidth": bytesPerSecond, "downtime-limit": 2000})
}

// start begins a migration that goes on and on.
func (m *migration) start() error { return errors.Join(m.bandwidth(slowBytes), m.begin()) }

// begin begins one with the bandwidth that was set.
func (m *migration) begin() error {
	return m.execute("migrate", map[string]any{"uri": "exec:cat >/dev/null"})
}

func (m *migration) cancel() error { return m.execute("migrate_cancel", nil) }

// end lets it come to its end. Where it does not converge by itself, since the guest writes faster, the downtime limit is what lets it.
func (m *migration) end() error { return m.bandwidth(fastBytes) }

// becomes waits until the migration stands so.
func (m *migration) becomes(want qemu.MigrationStatus) error {
	var now qemu.MigrationStatus
	var err error
	if !within(20*time.Second, func() bool {
		var s qemu.MigrationState
		s, err = qemu.Migration(m.t.Context(), m.b.Machine.Monitor)
		now = s.Status
		return err != nil || now == want
	}) || err != nil {
		return fmt.Errorf("the migration is %q and was to become %q: %w", now, want, err)
	}
	return nil
}

// plot says what a migration does in the course of a capture.
type plot struct {
	name string

	// It is started at the step, or at an earlier one if it is there for the step's sake: then it is active when that comes.
	started func(step capture.Step) capture.Step

	// act is what it does at the step, and then what it becomes; nil where it is started there and no more.
	act     func(*migration) error
	becomes qemu.MigrationStatus
}

// atIt starts it where the plot is.
func atIt(step capture.Step) capture.Step { return step }

// ahead starts it before the step where that can be: the capture looks for one in the beginning and right before each standstill, and after the
// instant, and ends where there is one.
func ahead(step capture.Step) capture.Step {
	switch {
	case step == capture.StepConfirmed, step == capture.StepTaken, step == capture.StepUnguarded: // after the last look
		return step
	case before(capture.StepSealing, step):
		return capture.StepSealing
	case before(capture.StepArmed, step) && before(step, capture.StepSealing):
		return capture.StepArmed
	case step == capture.StepHarvested:
		return capture.StepInvalidated
	}
	return step
}

var plots = []plot{
	{"starts", atIt, nil, qemu.MigrationActive},
	{"is cancelled", ahead, (*migration).cancel, qemu.MigrationCancelled},
	{"ends", ahead, (*migration).end, qemu.MigrationCompleted},
}

// TestMigration has migrations start, be cancelled and come to their end at every step of a checkpoint. What is active at the instant ends
// the checkpoint; what came to nothing before it, or began after it, leaves it a true image; and a machine that has gone stays where it is.
func TestMigration(t *testing.T) {
	atInstant := slices.DeleteFunc(slices.Clone(capture.Steps), func(step capture.Step) bool {
		return before(step, capture.StepArmed) || !before(step, capture.StepConfirmed)
	})
	for _, c := range []struct {
		version machine.Version
		plots   []plot
		steps   []capture.Step
	}{
		{machine.V10, plots, capture.Steps},
		{machine.V72, plots[1:], atInstant},
	} {
		t.Run(string(c.version), func(t *testing.T) {
			o := options()
			o.QEMU = c.version
			b := truth.NewBench(t, o)
			b.Capture(t.Context(), b.Options())
			for range 2 * *repeat {
				t.Run("switches over in the hold", func(t *testing.T) { switchesOver(t, b) })
			}
			for _, p := range c.plots {
				for _, step := range c.steps {
					for range *repeat {
						t.Run(fmt.Sprintf("%s/%s", p.name, step), func(t *testing.T) { migrates(t, b, p, step) })
					}
				}
			}
		})
	}
}

func migrates(t *testing.T, b *truth.Bench, p plot, step capture.Step) {
	b.T = t
	m := &migration{t, b}
	o := through(b, step)
	held := step == capture.StepSent || slices.Contains(inHold, step)
	start := p.started(step)
	done := make(chan error, 1) // what was asked of QEMU at the step is done
	started, acted := false, false
	var began atomic.Bool // the migration, of those that are started while the machine is held
	late := false         // it did only when the capture was done with the machine
	if err := m.bandwidth(slowBytes); err != nil {
		t.Fatal(err)
	}
	o.Hooks.Step = func(at capture.Step) {
		if at == capture.StepSealing && held && start == step {
			late = !began.Load()
		}
		if at == start && !started {
			started = true
			// While the machine is held it answers nobody: what is asked comes after that, before all else that is asked later.
			if held && start == step {
				asked := make(chan struct{})
				go func() {
					close(asked)
					err := m.begin()
					began.Store(true)
					done <- errors.Join(err, m.becomes(p.becomes))
				}()
				acted = true
				<-asked
				time.Sleep(5 * time.Millisecond)
				return
			}
			if err := errors.Join(m.start(), m.becomes(qemu.MigrationActive)); err != nil {
				t.Errorf("start at %q: %v", at, err)
			}
			if p.act == nil {
				acted = true
				done <- nil
			}
		}
		if at != step || acted {
			return
		}
		acted = true
		// It was active when last looked at, and is so slow that it still is.
		act := func() error { return errors.Join(p.act(m), m.becomes(p.becomes)) }
		if held {
			go func() { done <- act() }()
			time.Sleep(5 * time.Millisecond)
			return
		}
		done <- act()
	}
	result, captured := capture.Run(t.Context(), b.Target, b.Repository, o)
	if !acted {
		t.Fatalf("the step %q never came: %v", step, captured)
	}
	if err := <-done; err != nil {
		t.Fatalf("at %q: %v", step, err)
	}
	t.Logf("the checkpoint: %v", captured)

	trueOrNone(t, b, o.Name, result, captured)
	switch {
	case !before(step, capture.StepConfirmed):
		if captured != nil {
			t.Errorf("it was done with the machine before, and yet: %v", captured)
		}
	case p.becomes != qemu.MigrationCancelled:
		if captured == nil && !late {
			t.Error("a checkpoint of a machine that migrates")
		}
	case !held && step != capture.StepReleased:
		if captured != nil {
			t.Errorf("nothing migrates any more, and yet: %v", captured)
		}
	}

	switch p.becomes {
	case qemu.MigrationActive:
		if err := errors.Join(m.becomes(qemu.MigrationActive), m.cancel(), m.becomes(qemu.MigrationCancelled)); err != nil {
			t.Fatal(err)
		}
	case qemu.MigrationCompleted:
		gone(t, b, m)
	}
	sound(t, b)
}

// trueOrNone wants a true image of a capture, or none and the reason why.
func trueOrNone(t *testing.T, b *truth.Bench, name string, result *capture.Result, captured error) {
	t.Helper()
	if captured != nil {
		if !errors.Is(captured, capture.ErrMigrating) && !errors.Is(captured, capture.ErrStopped) {
			t.Errorf("error %v, want that it migrates or has gone", captured)
		}
		return
	}
	img, err := b.Repository.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	b.Judge(t.Context(), result, img)
}

// gone wants a machine that has migrated away to stay so, and takes it back in the end.
func gone(t *testing.T, b *truth.Bench, m *migration) {
	t.Helper()
	// It runs elsewhere: nothing of ours may wake it here, not even later.
	time.Sleep(50 * time.Millisecond)
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePostMigrate {
		t.Fatalf("the machine that has migrated away is %q, %v", state, err)
	}
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a checkpoint of a machine that has migrated away: error %v", err)
	}
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePostMigrate {
		t.Fatalf("the machine that has migrated away is %q after a capture was refused, %v", state, err)
	}
	// The test threw it away on the other side, and takes it back here. For a checkpoint it still has gone, until another migration
	// has come to nothing.
	err := errors.Join(b.Machine.Continue(t.Context()), m.start(), m.becomes(qemu.MigrationActive), m.cancel(), m.becomes(qemu.MigrationCancelled))
	if err != nil {
		t.Fatal(err)
	}
}

// switchesOver has a migration come to its switchover while the machine is held: it can only wait for QEMU's lock there, and takes the
// machine away as soon as that is let go, in the middle of what follows a hold.
func switchesOver(t *testing.T, b *truth.Bench) {
	b.T = t
	m := &migration{t, b}
	o := b.Options()
	attempts := 0
	o.Hooks.Step = func(at capture.Step) {
		var err error
		switch at {
		case capture.StepArmed: // the capture has just seen that there is none
			if attempts++; attempts == 1 {
				err = errors.Join(m.start(), m.becomes(qemu.MigrationActive), m.end())
			}
		case capture.StepHeld:
			// A migration looks at its bandwidth ten times a second.
			time.Sleep(time.Duration(150+rand.IntN(100)) * time.Millisecond)
		}
		if err != nil {
			t.Errorf("at %q: %v", at, err)
		}
	}
	result, captured := capture.Run(t.Context(), b.Target, b.Repository, o)
	t.Logf("the checkpoint: %v", captured)
	trueOrNone(t, b, o.Name, result, captured)
	if captured == nil {
		t.Error("a checkpoint of a machine that migrates")
	}
	if err := m.becomes(qemu.MigrationCompleted); err != nil {
		t.Fatal(err)
	}
	gone(t, b, m)
	sound(t, b)
}
