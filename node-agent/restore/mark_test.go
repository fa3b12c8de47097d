package restore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

func TestMark(t *testing.T) {
	records := filepath.Join(t.TempDir(), "not there")
	p := dirty.Process{PID: os.Getpid(), StartTime: 7}
	if err := Invalid(records, p); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	if n, err := Sweep(records); n != 0 || err != nil {
		t.Errorf("sweep without a directory: %d, %v", n, err)
	}
	if err := os.Mkdir(records, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.OpenRoot(records)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := Invalid(records, p); err != nil {
		t.Errorf("without a mark: %v", err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	mark := &Mark{Version: markVersion, Process: p, BootID: boot, Since: time.Unix(1e9, 0).UTC(), Phase: "memory", Image: dirty.Image{Name: "i", Digest: "d"}}
	if err := mark.write(dir); err != nil {
		t.Fatal(err)
	}
	var invalid *InvalidMemoryError
	if err := Invalid(records, p); !errors.As(err, &invalid) {
		t.Fatalf("with a mark: %v", err)
	}
	if diff := cmp.Diff(*mark, invalid.Mark); diff != "" {
		t.Error(diff)
	}
	if err := Invalid(records, dirty.Process{PID: p.PID, StartTime: 8}); err != nil {
		t.Errorf("another process with the same pid: %v", err)
	}

	mark.BootID = "another"
	if err := mark.write(dir); err != nil {
		t.Fatal(err)
	}
	if err := Invalid(records, p); err != nil {
		t.Errorf("a mark of another boot: %v", err)
	}
	for _, text := range []string{"", "{", `{"version": 99}`, `{"version": 1, "process": {"pid": 1, "startTime": 1}}`} {
		if err := os.WriteFile(filepath.Join(records, markName(p)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Invalid(records, p); err == nil || errors.As(err, &invalid) {
			t.Errorf("mark %q: %v", text, err)
		}
	}
}

func TestSweepTakesMarksOfProcessesThatAreGone(t *testing.T) {
	records := t.TempDir()
	ours := markName(dirty.Process{PID: os.Getpid(), StartTime: 7})
	for _, name := range []string{ours, "999999999-1.memory-invalid", "999999999-2.memory-invalid.new", "999999999-1.json", "readme"} {
		if err := os.WriteFile(filepath.Join(records, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := Sweep(records); n != 2 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	entries, err := os.ReadDir(records)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if diff := cmp.Diff([]string{"999999999-1.json", ours, "readme"}, left, cmp.Transformer("set", func(s []string) map[string]bool {
		m := map[string]bool{}
		for _, v := range s {
			m[v] = true
		}
		return m
	})); diff != "" {
		t.Error(diff)
	}
}

func TestStanding(t *testing.T) {
	want := map[string]bool{"prelaunch": true, "paused": true, "restore-vm": true}
	for _, state := range allStates {
		if standing(state) != want[string(state)] {
			t.Errorf("%s: %v", state, standing(state))
		}
	}
}

var allStates = []qemu.RunState{
	qemu.StateDebug, qemu.StateFinishMigrate, qemu.StateInMigrate, qemu.StateInternalError, qemu.StateIOError, qemu.StatePaused,
	qemu.StatePostMigrate, qemu.StatePrelaunch, qemu.StateRestoreVM, qemu.StateRunning, qemu.StateSaveVM, qemu.StateShutdown,
	qemu.StateSuspended, qemu.StateWatchdog, qemu.StateGuestPanicked, qemu.StateColo, qemu.StatePreconfig, "", "a state of the future",
}
