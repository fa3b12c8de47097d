package restore

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// writing is a guest with pages of every kind: of two words, of one word, whole ones, and half of its memory untouched.
func writing() machine.Writer {
	return machine.Writer{Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 200, DMAPagesPerPass: 2}}
}

// A machine captured is restored into another one, and that one is rolled back in place later.
func TestMachineGoesOnWhereItWas(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, accel := range []machine.Accel{machine.TCG, machine.KVM} {
			for _, memory := range []machine.Memory{machine.Private, machine.Memfd, machine.MemfdPrivate} {
				o := machine.Options{QEMU: version, Accel: accel, Memory: memory, Guest: writing(), Args: []string{"-device", "VGA"}}
				t.Run(o.String(), func(t *testing.T) {
					r := newRig(t)
					source := r.start(o)
					if _, err := source.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Passes > 20 }); err != nil {
						t.Fatal(err)
					}
					img := r.capture(source, "base")
					twin := r.start(source.Twin())
					r.restore(twin, img, r.options())
					r.goesOn(twin)

					inPlace := r.options()
					inPlace.InPlace = true
					result := r.restore(twin, img, inPlace)
					if !result.Stopped || result.Tracking != "" {
						t.Errorf("stopped %v, tracking %q", result.Stopped, result.Tracking)
					}
					r.goesOn(twin)
				})
			}
		}
	}
}

// The checkpoint after a restore is an increment on the restored image by tracking, and is itself right.
func TestNextCheckpointCountsFromRestoredImage(t *testing.T) {
	for _, inPlace := range []bool{false, true} {
		t.Run(fmt.Sprintf("in place %v", inPlace), func(t *testing.T) {
			r := newRig(t)
			source := r.start(machine.Options{QEMU: machine.V10, Accel: machine.KVM, Guest: writing()})
			first := r.capture(source, "first")
			target := source
			if inPlace {
				r.capture(source, "second") // what tracking counts from until the restore
			} else {
				target = r.start(source.Twin())
			}
			o := r.options()
			o.InPlace = inPlace
			r.restore(target, first, o)
			r.goesOn(target)
			result, err := capture.Run(t.Context(), capture.Target{Process: target.process, Monitor: target.monitor}, r.repo, capture.Options{
				Name: "next", RecordDir: r.records, Compression: image.S2, Mode: capture.Incremental,
			})
			if err != nil {
				t.Fatal(err)
			}
			if result.Parent != "first" || result.Source != "page tables" {
				t.Errorf("the next checkpoint is on %q by %q", result.Parent, result.Source)
			}
			twin := r.start(source.Twin())
			r.restore(twin, r.open("next"), r.options())
			r.goesOn(twin)
		})
	}
}

// The tables for the firmware may have another length in the target: the load of the device state gives them the recorded one.
func TestFirmwareTablesOfAnotherLength(t *testing.T) {
	for _, v := range []machine.Version{machine.V72, machine.V10} {
		t.Run(string(v), func(t *testing.T) {
			r := newRig(t)
			file := filepath.Join(t.TempDir(), "table")
			if err := os.WriteFile(file, bytes.Repeat([]byte("content"), 8000), 0o600); err != nil {
				t.Fatal(err)
			}
			tables := func(n int) (args []string) { // QEMU rounds them up to 128 KiB together
				for range n {
					args = append(args, "-acpitable", "sig=TEST,data="+file)
				}
				return args
			}
			o := machine.Options{QEMU: v, MemoryBytes: 64 * machine.MiB, Guest: writing(), Args: tables(3)}
			source := r.start(o)
			img := r.capture(source, "base")
			for _, n := range []int{0, 6} {
				o := source.Twin()
				o.Args = tables(n)
				twin := r.start(o)
				before := r.tablesBytes(twin)
				r.restore(twin, img, r.options())
				if now, want := r.tablesBytes(twin), r.tablesBytes(source); before == want || now != want {
					t.Errorf("the tables had %d bytes, have %d and are to have %d", before, now, want)
				}
				r.goesOn(twin)
			}
		})
	}
}

// tablesBytes is the length of the ACPI tables.
func (r *rig) tablesBytes(s *subject) uint64 {
	r.t.Helper()
	layout, err := qemu.ReadLayout(r.t.Context(), s.Monitor, s.process)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, b := range layout {
		if b.Name == "/rom@etc/acpi/tables" {
			return b.Bytes
		}
	}
	return 0
}

// Options.Run continues the machine.
func TestRunContinues(t *testing.T) {
	r := newRig(t)
	source := r.start(machine.Options{QEMU: machine.V72, Guest: writing()})
	img := r.capture(source, "base")
	o := r.options()
	o.Run, o.InPlace = true, true
	var told []string
	o.Progress = func(p Progress) {
		if p.DoneBytes > p.TotalBytes && p.TotalBytes > 0 {
			t.Errorf("progress: %+v", p)
		}
		told = append(told, p.Phase)
	}
	result, err := Run(t.Context(), source.target(), img, o)
	if err != nil {
		t.Fatal(err)
	}
	if state := r.state(source); !result.Resumed || state != "running" {
		t.Errorf("resumed %v, state %s", result.Resumed, state)
	}
	if len(told) == 0 || told[len(told)-1] != "comparing" {
		t.Errorf("progress was told of %q", told)
	}
	r.goesOn(source)
}

// A Linux guest with disk, network, balloon and channel goes on counting, its buffer whole.
func TestLinuxGoesOn(t *testing.T) {
	for _, o := range []machine.Options{
		{QEMU: machine.V72, Memory: machine.Private},
		{QEMU: machine.V10, Memory: machine.Memfd},
	} {
		t.Run(o.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			guest := machine.Linux{Loads: []machine.Load{machine.Counter, machine.DMA, machine.Net, machine.Alloc}}
			// QEMU 10.0 under TCG loses a completion of a disk on an I/O thread now and then when the machine is stopped, whoever stops it.
			disk := &machine.Disk{IOThread: o.QEMU == machine.V72}
			o.MemoryBytes, o.Guest, o.Net, o.FreePageReporting, o.Disk = 512*machine.MiB, guest, true, true, disk
			r := newRig(t)
			source := r.start(o)
			counted(t, ctx, source, guest, 5)
			before := lastCount(t, source)
			img := r.capture(source, "base")
			after := lastCount(t, source) + 1 // it may have counted and not yet said so
			twin := r.start(source.Twin())
			r.restore(twin, img, r.options())
			if err := twin.Continue(ctx); err != nil {
				t.Fatal(err)
			}
			restored := counted(t, ctx, twin, guest, 0)
			if restored.Count < before || restored.Count > after+1 {
				t.Errorf("captured between %d and %d, and goes on at %d", before, after, restored.Count)
			}
			counted(t, ctx, twin, guest, restored.Count+20)
			inPlace := r.options()
			inPlace.InPlace = true
			r.restore(twin, img, inPlace)
			lines, err := twin.Serial.Lines()
			if err != nil {
				t.Fatal(err)
			}
			if err := twin.Continue(ctx); err != nil {
				t.Fatal(err)
			}
			again := countedFrom(t, ctx, twin, guest, len(lines)+1, 0) // one line may be of both
			if again.Count > restored.Count+1 {
				t.Errorf("went on at %d before, and goes on at %d now", restored.Count, again.Count)
			}
			counted(t, ctx, twin, guest, restored.Count+30)
			c, err := twin.DialChannel(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if state, err := c.State(ctx); err != nil || !state.OK || state.Hash != guest.Counter().Hash(state.Count) {
				t.Errorf("on its channel: %v, %v", state, err)
			}
		})
	}
}

// lastCount is the last count that the guest has printed.
func lastCount(t *testing.T, s *subject) uint64 {
	t.Helper()
	lines, err := s.Serial.Lines()
	if err != nil {
		t.Fatal(err)
	}
	var count uint64
	for _, line := range lines {
		if state, ok := workload.ParseState(line); ok {
			count = state.Count
		}
	}
	return count
}

// counted waits until the guest has counted to at least count, and checks its buffer's hash.
func counted(t *testing.T, ctx context.Context, s *subject, guest machine.Linux, count uint64) workload.State {
	t.Helper()
	return countedFrom(t, ctx, s, guest, 0, count)
}

func countedFrom(t *testing.T, ctx context.Context, s *subject, guest machine.Linux, line int, count uint64) workload.State {
	t.Helper()
	var state workload.State
	_, _, err := s.Serial.WaitLine(ctx, line, func(line string) bool {
		var ok bool
		state, ok = workload.ParseState(line)
		return ok && state.Count >= count
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := guest.Counter().Hash(state.Count); !state.OK || state.Hash != want {
		t.Errorf("the guest says %v, and the hash of that count is %016x", state, want)
	}
	return state
}
