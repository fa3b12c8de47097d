package truth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// onKVM runs f on a machine of each QEMU under KVM with the bare-metal guest, which writes by vCPU and by DMA. KVM's log is kept, and a first
// image made.
func onKVM(t *testing.T, f func(t *testing.T, b *bench)) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
			o := machine.Options{QEMU: version, Accel: machine.KVM, Memory: memory, MemoryBytes: 64 * machine.MiB}
			t.Run(o.String(), func(t *testing.T) {
				o.Guest = machine.Writer{Percent: 50, Parameters: writer.Parameters{Random: true, DMAPagesPerPass: 2}}
				b := newBench(t, o)
				b.Witness, b.chance = true, false
				if w := b.witnessed(t.Context()); w.Alarm() {
					t.Errorf("witness of the first image: %+v", w)
				}
				f(t, b)
			})
		}
	}
}

// witnessed takes a checkpoint and judges it, and returns what the witness said.
func (b *bench) witnessed(ctx context.Context) *capture.WitnessReport {
	b.t.Helper()
	result, img := b.Capture(ctx, b.Options())
	b.Judge(ctx, result, img)
	if result.Witness == nil {
		b.t.Fatalf("no witness: %s", show(result))
	}
	return result.Witness
}

// TestWitness takes random instants with KVM's dirty log as a second witness: the page tables have missed nothing.
func TestWitness(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		for range 12 {
			result := b.instant(t.Context(), ordinary)
			if w := result.Witness; w == nil || !w.Compared || w.Alarm() || w.Why != "" {
				t.Fatalf("witness of image %s: %+v", result.Image, w)
			}
		}
	})
}

// TestWitnessAloneLosesDeviceWrites lets the guest write by vCPU and by DMA. The DMA's pages are not in KVM's log, and in the image all the same.
func TestWitnessAloneLosesDeviceWrites(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		b.witnessed(ctx)
		before, memory := b.status(), bytes.Clone(b.Oracle.Memory("pc.ram"))
		if _, err := b.Machine.WaitWriter(ctx, func(s writer.Status) bool { return s.DMAPages > before.DMAPages+100 }); err != nil {
			t.Fatal(err)
		}
		w := b.witnessed(ctx)
		p := b.Machine.WriterParameters()
		now, changed := b.Oracle.Memory("pc.ram"), uint64(0)
		for i := range p.DMA.Pages {
			at := p.DMA.GPA + i*pageset.PageBytes
			if !bytes.Equal(memory[at:][:pageset.PageBytes], now[at:][:pageset.PageBytes]) {
				changed++
			}
		}
		if changed == 0 || w.Unseen < changed || !w.Compared || w.Missed > 0 {
			t.Errorf("DMA changed %d pages; the witness: %+v", changed, w)
		}
		t.Logf("DMA changed %d pages, %d pages are not in KVM's log", changed, w.Unseen)
	})
}

// tracking finds the userfaultfd of the session in the machine, as nobody but a bug would.
func (b *bench) tracking() *pagetable.Userfaultfd {
	b.t.Helper()
	names, err := filepath.Glob(filepath.Join(b.RecordDir, "*.json"))
	if err != nil || len(names) != 1 {
		b.t.Fatalf("session records %v: %v", names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		b.t.Fatal(err)
	}
	var record struct{ Userfaultfd inject.RemoteFile }
	if err := json.Unmarshal(text, &record); err != nil {
		b.t.Fatal(err)
	}
	local, err := record.Userfaultfd.Duplicate(b.Machine.PID)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { local.Close() })
	return &pagetable.Userfaultfd{File: local}
}

// forget lets the guest write, stops it, and makes the page tables forget what its vCPU wrote, behind the back of the session.
func (b *bench) forget(ctx context.Context) {
	b.t.Helper()
	if _, err := b.Machine.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > b.status().Passes+2 }); err != nil {
		b.t.Fatal(err)
	}
	if err := b.Machine.Stop(ctx); err != nil {
		b.t.Fatal(err)
	}
	layout, err := qemu.ReadLayout(ctx, b.Target.Monitor, b.Target.Process)
	if err != nil {
		b.t.Fatal(err)
	}
	p := b.Machine.WriterParameters() // what its vCPU writes
	if err := b.tracking().WriteProtect(layout[0].HVA+p.Low.GPA, p.Low.Pages*pageset.PageBytes, true); err != nil {
		b.t.Fatal(err)
	}
}

// TestWitnessAlarm makes the page tables forget what was written, behind the back of the session. KVM's log tells, the image is right, and so is
// the next, for which there is no alarm any more. Without the witness the image is wrong.
func TestWitnessAlarm(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		b.forget(ctx)
		result, img := b.Capture(ctx, b.Options())
		b.Judge(ctx, result, img)
		if w := result.Witness; !w.Alarm() || w.First == "" || result.Source != byContentHash || !strings.Contains(result.Why, "KVM dirty log") {
			t.Errorf("%s", show(result))
		}
		if err := b.Machine.Continue(ctx); err != nil {
			t.Fatal(err)
		}
		if w := b.witnessed(ctx); w.Alarm() || !w.Compared {
			t.Errorf("witness of the image after: %+v", w)
		}

		b.witnessed(ctx)
		b.forget(ctx)
		b.Witness = false
		result, img = b.Capture(ctx, b.Options())
		wrong, err := b.Oracle.Compare(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		if len(wrong) == 0 || result.Witness != nil {
			t.Errorf("without a witness nothing is wrong: %s", show(result))
		}
	})
}

// TestWitnessComesAndGoes switches the log off and on, migrates in between, and loses the session record.
func TestWitnessComesAndGoes(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		want := func(what string, compared bool, why string) {
			t.Helper()
			w := b.witnessed(ctx)
			if w.Compared != compared || w.Alarm() || (w.Why == "") != (why == "") || !strings.Contains(w.Why, why) {
				t.Errorf("%s: %+v, want compared %v, why %q", what, w, compared, why)
			}
		}
		want("going on", true, "")
		b.Witness = false
		result := b.instant(ctx, ordinary)
		if result.Witness != nil {
			t.Errorf("a witness that was not asked for: %+v", result.Witness)
		}
		b.Witness = true
		want("asked for again", false, "last checkpoint")
		want("going on", true, "")

		// A migration that fails takes the log and leaves it switched off.
		if err := b.Machine.Monitor.Execute(ctx, "migrate", map[string]string{"uri": "exec:sleep 0.1; false"}, nil); err != nil {
			t.Fatal(err)
		}
		for {
			m, err := qemu.Migration(ctx, b.Machine.Monitor)
			if err != nil {
				t.Fatal(err)
			}
			if m.Status == qemu.MigrationFailed {
				break
			}
		}
		if state, err := qemu.Status(ctx, b.Machine.Monitor); err != nil || state != qemu.StateRunning {
			if err := b.Machine.Continue(ctx); err != nil {
				t.Fatal(err)
			}
		}
		want("after a migration", false, "migration")
		want("looked for anew", false, "last checkpoint")
		want("going on", true, "")

		b.RecordDir = b.t.TempDir()
		want("without a record", false, "last checkpoint")
		want("going on", true, "")

		b.Disconnect()
		process := dirty.Process{PID: b.Target.Process.PID, StartTime: b.Target.Process.StartTime}
		if _, err := dirty.Release(ctx, process, b.RecordDir); err != nil {
			t.Fatal(err)
		}
		b.Connect()
		want("after a release", false, "last checkpoint")
		want("going on", true, "")
	})
}

// logged counts the pages of main memory that are in KVM's log, which is on.
func (b *bench) logged(ctx context.Context) (n, all uint64) {
	b.t.Helper()
	must := func(err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	pid := b.Machine.PID
	layout, err := qemu.ReadLayout(ctx, b.Machine.Monitor, b.Target.Process)
	must(err)
	ranges, err := qemu.GuestRanges(ctx, b.Machine.Monitor, layout)
	must(err)
	const room = 1 << 20
	shared, err := inject.Do(ctx, pid, inject.Program{inject.OpenSharedMemory("test", room)})
	must(err)
	var vm inject.RemoteFile
	for fd := range 100 {
		if f, err := inject.Identify(pid, fd); err == nil && f.Link == "anon_inode:kvm-vm" {
			vm = f
		}
	}
	var wanted []inject.MemorySlot
	for i, r := range ranges {
		wanted = append(wanted, inject.MemorySlot{GPA: r.GPA, Bytes: r.Bytes, HVA: layout[r.Block].HVA + r.OffsetBytes,
			Bitmap: shared.Addresses[0] + uint64(i)<<16}.InSpace(r.Space))
	}
	thread, err := inject.MonitorThread(pid)
	must(err)
	helper, err := inject.StartResident(ctx, pid, thread)
	must(err)
	defer helper.Close()
	found, err := helper.Do(ctx, inject.Program{inject.FindMemorySlots(vm, wanted, shared.Addresses[0])})
	must(err)
	_, err = helper.Do(ctx, inject.Program{inject.ReadDirtyLogs(vm, found.Slots)})
	must(err)
	file, err := shared.Files[0].Duplicate(pid)
	must(err)
	defer file.Close()
	for _, s := range found.Slots {
		bitmap := make([]byte, (s.Bytes/pageset.PageBytes+63)/64*8)
		_, err := file.ReadAt(bitmap, int64(s.Bitmap-shared.Addresses[0]))
		must(err)
		set := pageset.New(s.Bytes / pageset.PageBytes)
		set.AddBitmap(0, set.Len(), bitmap)
		n, all = n+set.Count(), all+set.Len()
	}
	_, err = inject.Do(ctx, pid, inject.Program{inject.Unmap(shared.Files[0], shared.Addresses[0], room), inject.Close(shared.Files[0])})
	must(err)
	return n, all
}

// TestMigrationBeforeHold begins a migration right before the hold, unseen by the capture's last look. The log that was cleared in the hold is made
// whole for it: the memory that arrives is that of the machine.
func TestMigrationBeforeHold(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		p := b.Machine.WriterParameters()
		p.PagesPerPass, p.DMAPagesPerPass, p.Spin = 16, 0, 1_000_000
		if err := b.Machine.SetWriterParameters(ctx, p); err != nil {
			t.Fatal(err)
		}
		b.witnessed(ctx)
		set := map[string]uint64{"max-bandwidth": 64 << 10} // so that it lasts
		if err := b.Machine.Monitor.Execute(ctx, "migrate-set-parameters", set, nil); err != nil {
			t.Fatal(err)
		}
		idle := func() {
			t.Helper()
			if err := b.Machine.Monitor.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
				t.Fatal(err)
			}
			for {
				if m, err := qemu.Migration(ctx, b.Machine.Monitor); err != nil || m.Status.Idle() {
					return
				}
			}
		}
		// The first hold may be lost, for the device state is another now and then, and a second is not tried.
		for try := range 10 {
			begun, cleared := false, false
			o := b.Options()
			o.ResidueBudget = time.Second // for no barrier, which is armed as well
			o.Hooks.Step = func(s capture.Step) {
				switch {
				case s == capture.StepArmed && !begun:
					begun = true
					if err := b.Machine.Monitor.Execute(ctx, "migrate", map[string]string{"uri": "exec:cat >/dev/null"}, nil); err != nil {
						t.Error(err)
					}
					for {
						if m, err := qemu.Migration(ctx, b.Machine.Monitor); err != nil || m.Status == "active" {
							break
						}
					}
				case s == capture.StepRearmed:
					cleared = true
				}
			}
			_, err := capture.Run(ctx, b.Target, b.Repository, o)
			if !errors.Is(err, capture.ErrMigrating) {
				t.Fatalf("with a migration under way: %v", err)
			}
			if n, all := b.logged(ctx); cleared && n < all/2 {
				t.Errorf("KVM's log has %d pages of %d: it was not made whole", n, all)
			}
			idle()
			if cleared {
				break
			}
			if try == 9 {
				t.Error("the machine was never held with a migration under way")
			}
			b.witnessed(ctx) // looks for the log anew
			b.witnessed(ctx)
		}
		again := b.witnessed(ctx)
		if w := b.witnessed(ctx); !w.Compared || w.Alarm() {
			t.Errorf("after the migration: %+v, and then %+v", again, w)
		}
	})
}

// TestNested has the guest pass for one that runs guests of its own. Without KVM's log all is copied in the pause. With it the pages that it alone
// has are taken, and no alarm; that there are some is made so.
func TestNested(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		take := func(witness bool, source string) *capture.Result {
			t.Helper()
			o := b.Options()
			o.Hooks.Nested, o.Witness = true, witness
			o.Instant, o.ResidueBudget = capture.Early, time.Microsecond // all that can be would be guarded
			result, img := b.Capture(ctx, o)
			b.Judge(ctx, result, img)
			if result.Source != source || (source == byContentHash) != strings.Contains(result.Why, "guests of its own") {
				t.Errorf("want it by %q: %s", source, show(result))
			}
			return result
		}
		take(false, byContentHash)
		take(true, byContentHash) // it is switched on here
		if result := take(true, byPageTables); result.Guard != nil {
			t.Errorf("guarded: %s", show(result))
		}
		b.forget(ctx)
		if w := take(true, byPageTables).Witness; !w.Nested || w.Missed == 0 || w.Alarm() {
			t.Errorf("witness: %+v", w)
		}
		if err := b.Machine.Continue(ctx); err != nil {
			t.Fatal(err)
		}
		take(false, byContentHash)
	})
}

// TestNoWitnessWithoutKVM asks for the log where there is none.
func TestNoWitnessWithoutKVM(t *testing.T) {
	b := newBench(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{Percent: 50}})
	b.Witness = true
	for range 2 {
		if w := b.witnessed(t.Context()); w.Compared || w.Alarm() {
			t.Errorf("witness without KVM: %+v", w)
		}
	}
}

// BenchmarkWitness measures what the log costs in the hold.
func BenchmarkWitness(b *testing.B) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, gib := range []uint64{1, 4} {
			b.Run(fmt.Sprintf("%s/%dGiB", version, gib), func(b *testing.B) {
				parameters := writer.Parameters{Random: true, PagesPerPass: 1 << 10, Spin: 3_000_000}
				rig := NewBench(b, machine.Options{QEMU: version, Accel: machine.KVM, MemoryBytes: gib * machine.GiB,
					Guest: machine.Writer{Percent: 100, Parameters: parameters}})
				capture := func() *capture.WitnessReport {
					o := rig.Options()
					o.Witness, o.Hooks.Held = true, nil
					o.ResidueBudget = 10 * time.Second // no guard, which makes all that it had dirty the next time
					result, _ := rig.Capture(b.Context(), o)
					if w := result.Witness; w.Alarm() || w.Why != "" && rig.n > 1 {
						b.Fatal(show(result))
					}
					return result.Witness
				}
				first := capture()
				var read, clear []time.Duration
				for b.Loop() {
					w := capture()
					read, clear = append(read, w.Read), append(clear, w.Clear)
				}
				b.ReportMetric(float64(first.Find.Microseconds()), "µs-find")
				b.ReportMetric(float64(first.Clear.Microseconds()), "µs-clear-all")
				slices.Sort(read)
				slices.Sort(clear)
				b.ReportMetric(float64(read[len(read)/2].Microseconds()), "µs-read")
				b.ReportMetric(float64(clear[len(clear)/2].Microseconds()), "µs-clear")
			})
		}
	}
}
