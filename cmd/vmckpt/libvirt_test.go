package main

import (
	"testing"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/machine"
)

// TestThroughLibvirt captures a Linux guest and rolls it back, through a libvirt that is found beneath the root of the guest's process, in a
// mount namespace of its own: as on a KubeVirt node.
func TestThroughLibvirt(t *testing.T) {
	l := machine.StartLibvirt(t)
	s, records := newShell(t), t.TempDir()
	m := l.Start(t, machine.Options{MemoryBytes: 512 * machine.MiB, Guest: machine.Linux{}})
	name := m.Options().Name
	before := count(t, m)
	base := process[captureJSON](s, records, 0, "capture", name, "--name", "base")
	if base.Kind != "base" || base.VM.PID != m.PID {
		t.Errorf("base: %+v", base)
	}
	after := count(t, m)
	increment := process[captureJSON](s, records, 0, "capture", name, "--name", "increment", "--libvirt", l.Socket())
	if increment.Kind != "increment" {
		t.Errorf("increment: %+v", increment)
	}
	for count(t, m).Count < after.Count+20 {
	}
	far := count(t, m)
	rolled := process[restoreJSON](s, records, 0, "restore", "base", name, "--in-place", "--run")
	if !rolled.Stopped || !rolled.Resumed || state(t, m) != qemu.StateRunning {
		t.Errorf("rolled back: %+v", rolled)
	}
	if back := count(t, m); back.Count < before.Count || back.Count >= far.Count {
		t.Errorf("the guest counts on from %d; it was at %d when it was rolled back, and between %d and %d when captured",
			back.Count, far.Count, before.Count, after.Count)
	}
}

// count asks the guest where it is; its buffer has to be as it was left.
func count(t *testing.T, m *machine.Machine) workload.State {
	t.Helper()
	c, err := m.DialChannel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	state, err := c.State(t.Context())
	if err != nil || !state.OK {
		t.Fatalf("the guest's state: %+v, %v", state, err)
	}
	return state
}
