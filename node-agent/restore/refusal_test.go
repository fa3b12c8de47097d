package restore

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
)

// refused wants a restore to end in an error without having touched the machine.
func (r *rig) refused(s *subject, img *image.Image, o Options) error {
	r.t.Helper()
	state, memory := r.state(s), r.memoryHash(s)
	_, err := Run(r.t.Context(), s.target(), img, o)
	if err == nil {
		r.t.Fatal("the restore succeeded")
	}
	var invalid *InvalidMemoryError
	if errors.As(err, &invalid) {
		r.t.Errorf("the machine was touched: %v", err)
	}
	if err := Invalid(r.records, s.dirtyProcess()); err != nil {
		r.t.Errorf("the machine is marked: %v", err)
	}
	if now := r.state(s); now != state {
		r.t.Errorf("the machine was %s and is %s", state, now)
	}
	if state != qemu.StateRunning && r.memoryHash(s) != memory {
		r.t.Error("the machine's memory is not what it was")
	}
	return err
}

func (r *rig) memoryHash(s *subject) string {
	r.t.Helper()
	layout, err := qemu.ReadLayout(r.t.Context(), s.Monitor, s.process)
	if err != nil {
		r.t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", s.PID))
	if err != nil {
		r.t.Fatal(err)
	}
	defer mem.Close()
	h := sha256.New()
	for _, b := range layout {
		if _, err := io.Copy(h, io.NewSectionReader(mem, int64(b.HVA), int64(b.Bytes))); err != nil {
			r.t.Fatal(err)
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestOtherMachineIsRefused(t *testing.T) {
	base := machine.Options{QEMU: machine.V72, MemoryBytes: 64 * machine.MiB, Guest: writing()}
	r := newRig(t)
	source := r.start(base)
	img := r.capture(source, "base")
	for _, tt := range []struct {
		name   string
		change func(*machine.Options)
	}{
		{"machine type", func(o *machine.Options) { o.MachineType = "pc-q35-6.2" }},
		{"board", func(o *machine.Options) { o.MachineType = "pc-i440fx-7.2" }},
		{"memory size", func(o *machine.Options) { o.MemoryBytes = 96 * machine.MiB }},
		{"memory layout", func(o *machine.Options) { o.NUMANodes = 2 }},
		{"number of CPUs", func(o *machine.Options) { o.VCPUs = 2 }},
		{"a device more", func(o *machine.Options) { o.Balloon = true }},
		{"a device with memory more", func(o *machine.Options) { o.Args = []string{"-device", "VGA"} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := source.Twin()
			tt.change(&o)
			sub := &rig{t: t, repoDir: r.repoDir, repo: r.repo, records: r.records}
			other := sub.start(o)
			var mismatch *MismatchError
			if err := sub.refused(other, img, sub.options()); !errors.As(err, &mismatch) {
				t.Errorf("the error is %v", err)
			} else {
				t.Log(err)
			}
		})
	}
}

func TestStatesThatAreRefused(t *testing.T) {
	r := newRig(t)
	source := r.start(machine.Options{QEMU: machine.V10, MemoryBytes: 64 * machine.MiB, Guest: writing()})
	img := r.capture(source, "base")
	inPlace := r.options()
	inPlace.InPlace = true

	if err := r.refused(source, img, r.options()); !errors.Is(err, ErrNotPaused) {
		t.Errorf("a running machine, not in place: %v", err)
	}

	incoming := source.Twin()
	incoming.Args = append(incoming.Args, "-incoming", "defer")
	var state *StateError
	if err := r.refused(r.start(incoming), img, inPlace); !errors.As(err, &state) || state.State != qemu.StateInMigrate {
		t.Errorf("a machine that waits for a migration: %v", err)
	}

	// One that is on its way elsewhere, and one that has gone.
	execute := func(command string, args any) {
		t.Helper()
		if err := source.Monitor.Execute(t.Context(), command, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	execute("migrate", map[string]string{"uri": "exec:sleep 10"}) // nobody reads what it sends
	r.migrates(source, qemu.MigrationActive)
	if err := r.refused(source, img, inPlace); !errors.As(err, &state) || state.Migration.Idle() {
		t.Errorf("a machine that migrates: %v", err)
	}
	execute("stop", nil)
	if err := r.refused(source, img, inPlace); !errors.As(err, &state) || state.Migration.Idle() {
		t.Errorf("a machine that migrates, paused: %v", err)
	}
	execute("migrate_cancel", nil)
	r.migrates(source, qemu.MigrationCancelled)
	execute("migrate", map[string]string{"uri": "exec:cat >/dev/null"})
	r.migrates(source, qemu.MigrationCompleted)
	if err := r.refused(source, img, inPlace); !errors.As(err, &state) || state.State != qemu.StatePostMigrate {
		t.Errorf("a machine that has migrated: %v", err)
	}
}

// migrates waits until a migration stands where it is wanted.
func (r *rig) migrates(s *subject, want qemu.MigrationStatus) {
	r.t.Helper()
	for range 600 {
		m, err := qemu.Migration(r.t.Context(), s.Monitor)
		if err != nil {
			r.t.Fatal(err)
		}
		if m.Status == want {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.t.Fatalf("the migration did not come to %s", want)
}

// Whatever byte is flipped, in whatever file, and wherever one ends: the machine is not touched.
func TestDamagedImageIsRefused(t *testing.T) {
	r := newRig(t)
	o := machine.Options{QEMU: machine.V72, MemoryBytes: 64 * machine.MiB, Guest: writing()}
	source := r.start(o)
	r.capture(source, "base")
	twin := r.start(source.Twin())
	var files []string
	err := filepath.WalkDir(r.repoDir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && filepath.Base(filepath.Dir(path)) == "base" {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) < 5 {
		t.Fatalf("files of the image: %q, %v", files, err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		flipped := append([]byte(nil), content...)
		flipped[len(flipped)*2/3] ^= 0x10
		for what, damaged := range map[string][]byte{"flipped": flipped, "truncated": content[:len(content)-1], "empty": nil} {
			if err := os.WriteFile(file, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			img, err := r.repo.Open(t.Context(), "base")
			if err == nil {
				err = r.refused(twin, img, r.options())
				img.Close()
			}
			var damage *image.DamageError
			if !errors.As(err, &damage) {
				t.Errorf("%s %s: %v", filepath.Base(file), what, err)
			}
		}
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.restore(twin, r.open("base"), r.options())
	r.goesOn(twin)

	other, err := image.OpenRepository(r.repoDir, image.Keys{Secret: [32]byte{9}})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Open(t.Context(), "base"); !errors.Is(err, image.ErrWrongKey) {
		t.Errorf("with another key: %v", err)
	}
}

// The same RAM block of the same size may lie elsewhere for the guest. On this board an older QEMU's devices do not tell.
func TestOtherPlaceOfMemoryIsRefused(t *testing.T) {
	for _, v := range []machine.Version{machine.V72, machine.V10} {
		for _, board := range []string{"pc-q35-7.2", "pc-i440fx-7.2"} {
			t.Run(string(v)+" "+board, func(t *testing.T) {
				r := newRig(t)
				o := machine.Options{QEMU: v, MachineType: board, MemoryBytes: 64 * machine.MiB, Guest: writing()}
				source := r.start(o)
				img := r.capture(source, "base")
				twin := source.Twin()
				twin.MachineType += ",max-ram-below-4g=32M"
				var mismatch *MismatchError
				if err := r.refused(r.start(twin), img, r.options()); !errors.As(err, &mismatch) {
					t.Error(err)
				} else {
					t.Log(err)
				}
			})
		}
	}
}

// One piece of work a machine at a time.
func TestBusyMachineIsRefused(t *testing.T) {
	r := newRig(t)
	source := r.start(machine.Options{QEMU: machine.V72, MemoryBytes: 64 * machine.MiB, Guest: writing()})
	img := r.capture(source, "base")
	twin := r.start(source.Twin())
	o := r.options()
	o.Hooks.Step = func(s Step) error {
		if s == StepMarked {
			if _, err := Run(t.Context(), twin.target(), img, r.options()); !errors.Is(err, dirty.ErrBusy) {
				t.Errorf("a second restore: %v", err)
			}
		}
		return nil
	}
	r.restore(twin, img, o)
	r.goesOn(twin)
}
