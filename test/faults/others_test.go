package faults

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// other is a machine unlike the one that all faults are done to.
type other struct {
	bench  *truth.Bench
	resume func(context.Context) error       // as whoever manages it would
	twin   func(*testing.T) *machine.Machine // in its place
}

// plain is a machine without a manager.
func plain(t *testing.T, o machine.Options) other {
	b := truth.NewBench(t, o)
	return other{b, b.Machine.Continue, func(t *testing.T) *machine.Machine { return machine.Start(t, b.Machine.Twin()) }}
}

// managed is a Linux guest in a domain of libvirt, which passes all commands on and has a mind of its own.
func managed(t *testing.T) other {
	l := machine.StartLibvirt(t)
	m := l.Start(t, machine.Options{QEMU: machine.V10, MemoryBytes: 128 * machine.MiB, Guest: machine.Linux{
		Loads: []machine.Load{machine.Counter, machine.Stress}, BufferMiB: 1, StressPercent: 5, Step: 20 * time.Millisecond,
	}})
	resume := func(ctx context.Context) error { return errors.Join(l.Resume(m.Domain), m.Continue(ctx)) }
	return other{truth.NewBenchOf(t, m), resume, func(t *testing.T) *machine.Machine {
		if err := m.Kill(); err != nil { // the daemon knows one domain of a name
			t.Fatal(err)
		}
		return l.Start(t, m.Twin())
	}}
}

// TestOtherMachines does the most dangerous of the faults to other machines: of another QEMU, with memory of another kind, managed by
// libvirt.
func TestOtherMachines(t *testing.T) {
	older, memfd := options(), options()
	// Each takes seconds through libvirt: those that leave something in it or in QEMU.
	libvirtSteps := []capture.Step{capture.StepBarrier, capture.StepSent, capture.StepHeld, capture.StepRearmed, capture.StepReleased}
	if *repeat > 1 {
		libvirtSteps = capture.Steps
	}
	older.QEMU, memfd.Memory = machine.V72, machine.Memfd
	for _, c := range []struct {
		name  string
		start func(*testing.T) other
		steps []capture.Step
	}{
		{older.String(), func(t *testing.T) other { return plain(t, older) }, capture.Steps},
		{memfd.String(), func(t *testing.T) other { return plain(t, memfd) }, capture.Steps},
		{"libvirt", managed, libvirtSteps},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := c.start(t)
			b := o.bench
			f := newFamily(t)
			killed, _, hung, _ := blows(t)
			b.Capture(t.Context(), b.Options())
			for _, step := range c.steps {
				t.Run(fmt.Sprintf("worker killed/%s", step), func(t *testing.T) { killedAt(t, b, step, f) })
			}
			for _, step := range inHold {
				t.Run(fmt.Sprintf("holder killed/%s", step), func(t *testing.T) { holderSuffers(t, b, killed, through(b, step), step, "instant") })
			}
			t.Run("holder hung", func(t *testing.T) { holderSuffers(t, b, hung, b.Options(), capture.StepHeld, "instant") })
			t.Run("resumed by others", func(t *testing.T) {
				img := resumedByOthers(t, b, 3**repeat, o.resume)
				sound(t, b)
				restored(t, o.twin(t), img)
			})
		})
	}
}
