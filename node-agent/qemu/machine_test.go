package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// emulator is one QEMU build that tests run against.
type emulator struct{ path string }

// forEachQEMU runs f against QEMU 7.2 and against QEMU 10, in parallel. One that is not there is skipped, saying so.
func forEachQEMU(t *testing.T, f func(t *testing.T, e emulator)) {
	t.Helper()
	for name, find := range map[string]func(*testing.T) emulator{"qemu7.2": qemu72, "qemu10": qemu10} {
		t.Run(name, func(t *testing.T) {
			e := find(t)
			t.Parallel()
			f(t, e)
		})
	}
}

func qemu72(t *testing.T) emulator {
	t.Helper()
	return findQEMU(t, "version 7.2.", unpacked("qemu-7.2"))
}

// qemu10 is the QEMU that VMCKPT_QEMU10 names, or any other of that version.
func qemu10(t *testing.T) emulator {
	t.Helper()
	if path := os.Getenv("VMCKPT_QEMU10"); path != "" {
		return emulator{path}
	}
	return findQEMU(t, "version 10.", unpacked("qemu-10"))
}

// unpacked is where hack/setup puts a QEMU that is not the system's.
func unpacked(directory string) string {
	cache := os.Getenv("VMCKPT_CACHE")
	if cache == "" {
		cache = "../../.cache"
	}
	return filepath.Join(cache, directory, "qemu-system-x86_64")
}

// findQEMU returns the unpacked QEMU or the system's, whichever has the version.
func findQEMU(t *testing.T, version, unpacked string) emulator {
	t.Helper()
	for _, name := range []string{unpacked, "qemu-system-x86_64"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if out, err := exec.CommandContext(t.Context(), path, "--version").Output(); err == nil && strings.Contains(string(out), version) {
			return emulator{path}
		}
	}
	t.Skipf("QEMU %s is missing (run hack/setup)", strings.Trim(strings.TrimPrefix(version, "version "), "."))
	return emulator{}
}

// guest is a QEMU that a test started, ended with the test.
type guest struct {
	cmd    *exec.Cmd
	name   string
	socket string
	stderr *lockedBuffer
	dir    string
}

// start runs QEMU under TCG, with a plain QMP socket and without default devices. files become fds 3, 4, ... in it.
func (e emulator) start(t *testing.T, files []*os.File, args ...string) *guest {
	t.Helper()
	dir := t.TempDir()
	g := &guest{
		name:   fmt.Sprintf("vmckpt-test-%d-%s", os.Getpid(), strings.NewReplacer("/", "-", "_", "-").Replace(t.Name())),
		socket: filepath.Join(dir, "q"),
		stderr: new(lockedBuffer),
		dir:    dir,
	}
	if len(g.socket) > 100 { // sun_path holds 108 bytes
		short, err := os.MkdirTemp("", "vmckpt")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(short) })
		g.socket = filepath.Join(short, "q")
	}
	g.cmd = exec.Command(e.path, append([]string{
		"-name", "guest=" + g.name + ",debug-threads=on", "-nodefaults", "-display", "none", "-accel", "tcg",
		"-qmp", "unix:" + g.socket + ",server=on,wait=off",
	}, args...)...)
	g.cmd.Stderr = g.stderr
	g.cmd.ExtraFiles = files
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { g.cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		<-exited
		if t.Failed() && g.stderr.String() != "" {
			t.Logf("qemu said: %s", g.stderr)
		}
	})
	for {
		if _, err := os.Stat(g.socket); err == nil {
			return g
		}
		select {
		case <-exited:
			t.Fatalf("qemu ended at once: %s", g.stderr)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// lockedBuffer takes what QEMU says while the test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (g *guest) dial(t *testing.T) Monitor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		m, err := DialUnix(ctx, g.socket)
		if err == nil {
			t.Cleanup(func() { m.Close() })
			return m
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond) // bound, but not listening yet
	}
}

func (g *guest) find(t *testing.T) *Process {
	t.Helper()
	p, err := Find(t.Context(), Selector{Guest: g.name, PID: g.cmd.Process.Pid})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMonitorOfRealQEMU(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, e emulator) {
		g := e.start(t, nil, "-m", "32", "-uuid", "5B0C6A3D-7f5e-4d0e-9ac5-000000000001")
		m := g.dial(t)
		p := g.find(t)
		if p.PID != g.cmd.Process.Pid || !p.Alive() || p.UUID != "5b0c6a3d-7f5e-4d0e-9ac5-000000000001" {
			t.Fatalf("found %+v for pid %d", p, g.cmd.Process.Pid)
		}
		if len(p.QMPPaths) != 1 || p.QMPPaths[0] != g.socket || p.Libvirt {
			t.Errorf("QMP paths %q, libvirt %v", p.QMPPaths, p.Libvirt)
		}

		sub := m.Subscribe("STOP", "RESUME")
		if s, err := Status(t.Context(), m); s != StateRunning || err != nil {
			t.Fatalf("status %q, %v", s, err)
		}
		before := time.Now()
		for _, c := range []string{"stop", "cont"} {
			if err := m.Execute(t.Context(), c, nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []string{"STOP", "RESUME"} {
			ev := <-sub.C
			if ev.Name != want || ev.Time.Before(before.Add(-time.Second)) || ev.Time.After(time.Now()) {
				t.Errorf("event %+v, want %s", ev, want)
			}
		}
		if ms, err := Migration(t.Context(), m); err != nil || !ms.Status.Idle() || len(ms.Blocked) > 0 {
			t.Errorf("migration %+v, %v", ms, err)
		}
		var refused *QMPError
		if err := m.Execute(t.Context(), "no-such-command", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
			t.Errorf("an unknown command gave %v", err)
		}

		g.cmd.Process.Kill()
		if _, ok := <-sub.C; ok || sub.Err() == nil {
			t.Errorf("subscription outlived qemu: %v", sub.Err())
		}
		if err := m.Execute(t.Context(), "query-status", nil, nil); err == nil {
			t.Error("a command to a dead QEMU succeeded")
		}
	})
}

// A leash in small: the VM stands for as long as the reader takes, and runs on when the reader is gone.
func TestSaveDeviceStateIntoPipe(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, e emulator) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		g := e.start(t, []*os.File{w}, "-machine", "q35", "-m", "32", "-device", "VGA")
		w.Close()
		m := g.dial(t)
		sub := m.Subscribe("STOP", "RESUME")
		const filename = "/proc/self/fd/3" // an anonymous pipe's writing end, inherited

		done := make(chan error, 1)
		go func() { done <- SaveDeviceState(t.Context(), m, filename) }()
		head := make([]byte, 8)
		if _, err := r.Read(head); err != nil || !bytes.HasPrefix(head, []byte("QEVM\x00\x00\x00\x03")) {
			t.Fatalf("stream begins with %q, %v", head, err)
		}
		if ev := <-sub.C; ev.Name != "STOP" {
			t.Errorf("event %v, want STOP", ev.Name)
		}
		// QEMU's own writing end stays open for the test's fd, so the end of the stream is known by the command's answer.
		go func() {
			buf := make([]byte, 64<<10)
			for {
				if _, err := r.Read(buf); err != nil {
					return
				}
			}
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if ev := <-sub.C; ev.Name != "RESUME" {
			t.Errorf("event %v, want RESUME", ev.Name)
		}

		r.Close()
		time.Sleep(20 * time.Millisecond)
		var refused *QMPError
		if err := SaveDeviceState(t.Context(), m, filename); !errors.As(err, &refused) {
			t.Errorf("saving to a reader that is gone gave %v", err)
		}
		if s, err := Status(t.Context(), m); s != StateRunning || err != nil {
			t.Errorf("afterwards %q, %v", s, err)
		}
	})
}
