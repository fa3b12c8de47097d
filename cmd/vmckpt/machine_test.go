package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// command starts the program as users do: a process of its own, with workers of its own.
func (s *shell) command(records string, args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe", append(args, "--record-dir", records)...)
	c.Env = append(os.Environ(), mainVariable+"=1", repositoryVariable+"="+s.repo, keyVariable+"="+s.key)
	return c
}

// process runs the program and decodes its answer.
func process[T any](s *shell, records string, wantExit int, args ...string) (answer T) {
	s.t.Helper()
	c := s.command(records, append(args, "--output", "json")...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	stdout, err := c.Output()
	var exited *exec.ExitError
	if err != nil && !errors.As(err, &exited) {
		s.t.Fatal(err)
	}
	if exit := c.ProcessState.ExitCode(); exit != wantExit {
		s.t.Fatalf("vmckpt %s: exit code %d, want %d; standard error:\n%s", strings.Join(args, " "), exit, wantExit, stderr.String())
	}
	if err := json.Unmarshal(stdout, &answer); err != nil {
		s.t.Fatalf("vmckpt %s: %v in:\n%s", strings.Join(args, " "), err, stdout)
	}
	return answer
}

// failed runs the program, which must fail, and returns its error.
func failed(s *shell, records string, wantExit int, args ...string) failureJSON {
	s.t.Helper()
	return process[struct{ Error failureJSON }](s, records, wantExit, args...).Error
}

func state(t *testing.T, m *machine.Machine) qemu.RunState {
	t.Helper()
	s, err := qemu.Status(t.Context(), m.Monitor)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// passes returns how far the machine's guest has come, and fails where it found a page that it did not write.
func passes(t *testing.T, m *machine.Machine) uint64 {
	t.Helper()
	status, begun, err := m.WriterStatus(t.Context())
	if err != nil || !begun || status.Errors != 0 {
		t.Fatalf("the guest's account: %+v, begun %v, %v", status, begun, err)
	}
	return status.Passes
}

// goesOn waits until the guest has made some more passes over its memory.
func goesOn(t *testing.T, m *machine.Machine) {
	t.Helper()
	before := passes(t, m)
	if _, err := m.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Passes > before+5 }); err != nil {
		t.Fatal(err)
	}
	passes(t, m)
}

// TestMachine goes the whole way: a base and increments of a running guest, verified, restored into a fresh QEMU and rolled back in
// place; then tracking taken out.
func TestMachine(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 128 * machine.MiB, Guest: machine.Writer{
		Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, DMAPagesPerPass: 2, Spin: 100_000},
	}})
	name := m.Options().Name

	base := process[captureJSON](s, records, 0, "capture", name, "--monitor", m.Socket, "--name", "base")
	if base.Kind != "base" || base.Image != "base" || base.VM.PID != m.PID || len(base.Pauses) == 0 || base.Downtime == 0 ||
		base.MemoryBytes < 128<<20 || base.OwnBytes == 0 || base.OwnBytes != base.TotalBytes {
		t.Errorf("base: %+v", base)
	}
	at := passes(t, m)
	goesOn(t, m)
	increment := process[captureJSON](s, records, 0, "capture", "--guest", name, "--name", "increment", "--compression", "s2", "--attribute", "for=test")
	if increment.Kind != "increment" || increment.Parent != "base" || increment.Source != "page tables" || increment.OwnBytes >= increment.TotalBytes {
		t.Errorf("increment: %+v", increment)
	}
	goesOn(t, m)
	named := process[captureJSON](s, records, 0, "capture", "--uuid", m.Options().UUID)
	if !strings.HasPrefix(named.Image, name+"-") || named.Parent != "increment" {
		t.Errorf("a capture without a name: %+v", named)
	}

	if got := runJSON[listJSON](s, 0, "list"); len(got.Images) != 3 || got.Images[1].Attributes["for"] != "test" {
		t.Errorf("list: %+v", got)
	}
	if got := runJSON[verifyJSON](s, 0, "verify"); !got.OK || len(got.Images) != 3 {
		t.Errorf("verify: %+v", got)
	}

	// A running machine is not restored into unless that is said.
	if got := failed(s, records, exitRefused, "restore", "base", name); got.Code != jobs.CodeState {
		t.Errorf("restore into a running machine: %+v", got)
	}
	now := passes(t, m)
	rolled := process[restoreJSON](s, records, 0, "restore", "base", name, "--in-place")
	if !rolled.Stopped || rolled.Resumed || state(t, m) != qemu.StatePaused {
		t.Errorf("rolled back: %+v, the machine is %s", rolled, state(t, m))
	}
	if back := passes(t, m); back > at || back >= now {
		t.Errorf("rolled back from pass %d to %d, the image was made before pass %d", now, back, at)
	}
	if err := m.Continue(t.Context()); err != nil {
		t.Fatal(err)
	}
	goesOn(t, m)

	twin := m.Twin()
	twin.Name, twin.UUID = twin.Name+"-twin", m.Options().UUID
	fresh := machine.Start(t, twin)
	restored := process[restoreJSON](s, records, 0, "restore", "increment", twin.Name, "--run", "--full-compare")
	if !restored.Resumed || restored.PID != fresh.PID || state(t, fresh) != qemu.StateRunning {
		t.Errorf("restored: %+v", restored)
	}
	goesOn(t, fresh)

	if got := machineOf(s, records, m.PID); got.TrackedSince != "base" || got.NotTracked != "" || got.Guest != name || got.Busy {
		t.Errorf("machines: %+v", got)
	}
	released := process[jobs.ReleaseResult](s, records, 0, "release", name)
	if released.PID != m.PID || !released.Tracked {
		t.Errorf("released: %+v", released)
	}
	if again := process[jobs.ReleaseResult](s, records, 0, "release", name); again.Tracked {
		t.Errorf("released again: %+v", again)
	}
	if got := machineOf(s, records, m.PID); got.TrackedSince != "" || !strings.Contains(got.NotTracked, "release") {
		t.Errorf("machines, after the release: %+v", got)
	}
	if found := userfaultfds(t, m.PID); found != 0 {
		t.Errorf("%d userfaultfds are left in the machine's process", found)
	}
	goesOn(t, m)
}

// machineOf returns what the command that lists machines says of one.
func machineOf(s *shell, records string, pid int) machineJSON {
	s.t.Helper()
	for _, m := range process[machinesJSON](s, records, 0, "machines").Machines {
		if m.PID == pid {
			return m
		}
	}
	s.t.Fatalf("machine %d is not listed", pid)
	return machineJSON{}
}

// TestOwnerPaused captures a machine that its owner has paused: the guest loses no time by it, and the next capture says why it compares.
func TestOwnerPaused(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}})
	name := m.Options().Name
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	base := process[captureJSON](s, records, 0, "capture", name, "--name", "base")
	if !base.OwnerPaused || base.Downtime != 0 || len(base.Pauses) == 0 || base.Pauses[0].Total == 0 {
		t.Errorf("base: %+v", base)
	}
	if shown := s.ok("show", "base"); !strings.Contains(shown, "paused      by its owner") || !strings.Contains(shown, ", and the sealing") {
		t.Errorf("show:\n%s", shown)
	}
	if got := state(t, m); got != qemu.StatePaused {
		t.Errorf("the machine is %s", got)
	}
	process[jobs.ReleaseResult](s, records, 0, "release", name)
	if got := process[captureJSON](s, records, 0, "capture", name, "--name", "next"); got.Why != "tracking was taken out by a release" {
		t.Errorf("after a release: %q by %q", got.Why, got.Source)
	}
	for _, want := range []string{"tracking is taken out of", "nothing was tracked in"} {
		if got := s.ok("release", name, "--record-dir", records); !strings.HasPrefix(got, want) {
			t.Errorf("release: %q, want %s", got, want)
		}
	}
	process[captureJSON](s, records, 0, "capture", name, "--name", "last")
	// The image that tracking counts from is in another repository.
	other := newShell(t)
	if got := process[captureJSON](other, records, 0, "capture", name, "--name", "base"); got.Kind != "base" ||
		!strings.Contains(got.Why, "image last, which is not in this repository") {
		t.Errorf("into another repository: %q", got.Why)
	}
}

// TestSharedMemoryWithBalloon: a base says that such memory is copied in the pause, as an increment does.
func TestSharedMemoryWithBalloon(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Memory: machine.Memfd, Balloon: true, Guest: machine.Writer{}})
	for _, name := range []string{"base", "increment"} {
		if got := process[captureJSON](s, records, 0, "capture", m.Options().Name, "--name", name); got.Kind != name || !strings.Contains(got.Why, "copied in the pause") {
			t.Errorf("%s: %s (%s)", name, got.Kind, got.Why)
		}
	}
}

// TestEndsMeanwhile has QEMU end in the middle of a capture: the hint is not to name another one.
func TestEndsMeanwhile(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 512 * machine.MiB, Guest: machine.Writer{
		Parameters: writer.Parameters{Random: true, PagesPerPass: 4096},
	}})
	goesOn(t, m)
	exit, words := s.disturb(records, "copying", func(*os.Process) error { return m.Kill() }, "capture", m.Options().Name)
	if exit != exitNotFound || !strings.Contains(words, "hint: the QEMU has ended in the middle") || !strings.Contains(words, "no image was made") {
		t.Errorf("exit code %d, want %d", exit, exitNotFound)
	}
	if got := runJSON[listJSON](s, 0, "list"); len(got.Images) != 0 {
		t.Errorf("there is an image: %+v", got.Images)
	}
	if other := errors.New("another"); endedMeanwhile(other, "") != other {
		t.Error("another error has that hint too")
	}
}

// TestNoLibvirt names a socket that is not there.
func TestNoLibvirt(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}})
	got := failed(s, records, exitNotFound, "capture", m.Options().Name, "--libvirt", "/nowhere")
	if got.Code != jobs.CodeUnreachable || strings.Contains(got.Message, "\n") || strings.Count(got.Message, "/nowhere") != 1 {
		t.Errorf("%+v", got)
	}
}

// userfaultfds counts those in a process.
func userfaultfds(t *testing.T, pid int) (n int) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.Contains(target, "userfaultfd") {
			n++
		}
	}
	return n
}

// TestOtherMachine restores into a machine with less memory, which is refused and not touched.
func TestOtherMachine(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	o := machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}}
	m := machine.Start(t, o)
	process[captureJSON](s, records, 0, "capture", m.Options().Name, "--name", "base")
	o.MemoryBytes, o.Paused = 96*machine.MiB, true
	other := machine.Start(t, o)
	got := failed(s, records, exitRefused, "restore", "base", other.Options().Name)
	if got.Code != jobs.CodeMismatch || !strings.Contains(got.Message, "pc.ram") {
		t.Errorf("error %+v", got)
	}
	if err := other.Continue(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := other.Ready(t.Context()); err != nil {
		t.Errorf("the machine was touched: %v", err)
	}
}

// TestWrongKeyMakesNoBase names another key file by mistake, when nothing on the host says that there is an image of the machine.
func TestWrongKeyMakesNoBase(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}})
	name := m.Options().Name
	process[captureJSON](s, records, 0, "capture", name, "--name", "base")
	process[jobs.ReleaseResult](s, records, 0, "release", name)
	right := s.key
	otherKey(t, s, m)
	if got := failed(s, records, exitDamaged, "capture", name, "--name", "wrong"); got.Code != jobs.CodeWrongKey {
		t.Errorf("error %+v", got)
	}
	if got := runJSON[listJSON](s, 0, "list"); len(got.Images) != 1 {
		t.Errorf("there is an image more: %+v", got.Images)
	}
	// To go on under another key is to be said.
	process[captureJSON](s, records, 0, "capture", name, "--name", "new-key", "--mode", "full")
	process[jobs.ReleaseResult](s, records, 0, "release", name)
	s.key = right
	if got := process[captureJSON](s, records, 0, "capture", name, "--name", "increment"); got.Parent != "base" {
		t.Errorf("under the right key: %+v", got)
	}
}

// TestReadOnlyVolume says what is wrong where the repository's volume is mounted read-only.
func TestReadOnlyVolume(t *testing.T) {
	volume := t.TempDir()
	if err := unix.Mount("none", volume, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("not available here: mounting a small volume: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(volume, unix.MNT_DETACH) }) //nolint:errcheck // the directory cannot be removed else, and that is told
	s := &shell{t: t, repo: filepath.Join(volume, "repository"), key: filepath.Join(t.TempDir(), "key")}
	s.ok("init")
	s.write("web-1", "", 0, 0, 40)
	if err := unix.Mount("none", volume, "", unix.MS_REMOUNT|unix.MS_RDONLY, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if got := runJSON[listJSON](s, 0, "list"); len(got.Images) != 1 {
		t.Errorf("list: %+v", got)
	}
	for _, args := range [][]string{{"delete", "web-1"}, {"init", "--repo", filepath.Join(volume, "other")}} {
		_, stderr, exit := s.run(args...)
		if exit != exitRefused || !strings.Contains(stderr, "read-only file system") || !strings.Contains(stderr, "mounted read-only") {
			t.Errorf("vmckpt %v: exit code %d, standard error:\n%s", args, exit, stderr)
		}
	}
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}})
	if got := failed(s, t.TempDir(), exitRefused, "capture", m.Options().Name); got.Code != jobs.CodeNoAccess {
		t.Errorf("capture: %+v", got)
	}
}

// TestBusy has somebody at work on a machine who holds its only monitor: the next command says so, and soon.
func TestBusy(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{}})
	name := m.Options().Name
	process[captureJSON](s, records, 0, "capture", name, "--name", "base")
	holder, err := net.Dial("unix", m.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	found, err := qemu.Find(t.Context(), qemu.Selector{PID: m.PID})
	if err != nil {
		t.Fatal(err)
	}
	for _, after := range []time.Duration{0, time.Second} { // the socket is had before the session
		for _, args := range [][]string{{"capture", name, "--name", "next"}, {"restore", "base", name, "--in-place"}} {
			locked := make(chan io.Closer, 1)
			lock := func() {
				l, err := dirty.Lock(records, dirty.Process{PID: found.PID, StartTime: found.StartTime})
				if err != nil {
					t.Error(err)
				}
				locked <- l
			}
			if after == 0 {
				lock()
			} else {
				time.AfterFunc(after, lock)
			}
			begin := time.Now()
			got := failed(s, records, exitBusy, append(args, "--monitor", m.Socket)...)
			if took := time.Since(begin); got.Code != jobs.CodeBusy || took > after+3*time.Second || !strings.Contains(got.Message, fmt.Sprintf("process %d", os.Getpid())) {
				t.Errorf("vmckpt %v, after %v: %+v", args, took, got)
			}
			if l := <-locked; l != nil {
				l.Close()
			}
		}
	}
	lock, err := dirty.Lock(records, dirty.Process{PID: found.PID, StartTime: found.StartTime})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	begin := time.Now()
	if got := failed(s, records, exitBusy, "release", name); got.Code != jobs.CodeBusy || time.Since(begin) > 3*time.Second ||
		!strings.Contains(got.Message, fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("release: %+v", got)
	}
	if got := machineOf(s, records, m.PID); !got.Busy || got.BusyWith != os.Getpid() {
		t.Errorf("machines: %+v", got)
	}
	if got := state(t, m); got != qemu.StateRunning {
		t.Errorf("the machine is %s", got)
	}
}

// TestInterrupted interrupts a capture; the machine goes on, there is no image, and nothing is left behind.
func TestInterrupted(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 512 * machine.MiB, Guest: machine.Writer{
		Parameters: writer.Parameters{Random: true, PagesPerPass: 4096},
	}})
	goesOn(t, m)
	if exit, _ := s.interrupt(records, "copying", []unix.Signal{unix.SIGINT}, "capture", m.Options().Name); exit != exitInterrupted {
		t.Errorf("exit code %d, want %d", exit, exitInterrupted)
	}
	if got := runJSON[listJSON](s, 0, "list"); len(got.Images) != 0 {
		t.Errorf("there is an image: %+v", got.Images)
	}
	if left, err := os.ReadDir(filepath.Join(s.repo, "tmp")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if got := state(t, m); got != qemu.StateRunning {
		t.Errorf("the machine is %s", got)
	}
	goesOn(t, m)
}

// interrupt runs the program, sends it signals once it is in a phase, and returns its exit code and what it told, its answer in the end.
func (s *shell) interrupt(records, phase string, signals []unix.Signal, args ...string) (exit int, words string) {
	s.t.Helper()
	return s.disturb(records, phase, func(program *os.Process) error {
		for i, signal := range signals {
			if i > 0 {
				time.Sleep(50 * time.Millisecond) // else the kernel makes one of them
			}
			if err := program.Signal(signal); err != nil {
				return err
			}
		}
		return nil
	}, args...)
}

// disturb runs the program and does something once it is in a phase; it returns what interrupt does.
func (s *shell) disturb(records, phase string, do func(program *os.Process) error, args ...string) (exit int, words string) {
	s.t.Helper()
	c := s.command(records, append(args, "--progress", "plain")...)
	var answer bytes.Buffer
	c.Stdout = &answer
	stderr, err := c.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	late := time.AfterFunc(30*time.Second, func() { c.Process.Kill() })
	defer late.Stop()
	var told bytes.Buffer
	for b := make([]byte, 4096); !strings.Contains(told.String(), phase); {
		n, err := stderr.Read(b)
		told.Write(b[:n])
		if err != nil {
			s.t.Fatalf("it ended before it was interrupted:\n%s", told.String())
		}
	}
	if err := do(c.Process); err != nil {
		s.t.Fatal(err)
	}
	io.Copy(&told, stderr) //nolint:errcheck // what there is
	c.Wait()               //nolint:errcheck // its exit code says it
	told.Write(answer.Bytes())
	s.t.Logf("interrupted:\n%s", told.String())
	return c.ProcessState.ExitCode(), told.String()
}

// TestInterruptedRestore interrupts a restore that is overwriting memory: once, and it comes to its end; twice, and the machine is left with its
// memory half written: it stands still, is captured by nobody, and the next restore finishes it.
func TestInterruptedRestore(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 512 * machine.MiB, Disk: &machine.Disk{}, Guest: machine.Writer{
		Parameters: writer.Parameters{Random: true, PagesPerPass: 4096},
	}})
	name := m.Options().Name
	if _, err := m.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > 100_000 }); err != nil {
		t.Fatal(err)
	}
	process[captureJSON](s, records, 0, "capture", name, "--name", "base")
	exit, words := s.interrupt(records, "memory", []unix.Signal{unix.SIGHUP}, "restore", "base", name, "--in-place", "--run", "--output", "json")
	if exit != 0 || strings.Count(words, "was brought to its end") != 2 || // told, and in the answer
		!strings.Contains(words, `"disks are not part of the image: `) || !strings.Contains(words, "to interrupt again kills it") || !strings.Contains(words, "interrupted; the restore was brought to its end") {
		t.Fatalf("interrupted once: exit code %d", exit)
	}
	if got := state(t, m); got != qemu.StateRunning {
		t.Errorf("interrupted once, the machine is %s", got)
	}
	goesOn(t, m)

	// Its worker, which nobody supervises any more, brings it to its end as well.
	resumes := m.Monitor.Subscribe("RESUME")
	s.interrupt(records, "memory", []unix.Signal{unix.SIGKILL}, "restore", "base", name, "--in-place", "--run")
	select {
	case <-resumes.C:
	case <-time.After(30 * time.Second):
		t.Errorf("its command killed, the restore does not come to its end; the machine is %s", state(t, m))
	}
	resumes.Close()
	goesOn(t, m)

	if exit, _ := s.interrupt(records, "memory", []unix.Signal{unix.SIGINT, unix.SIGINT}, "restore", "base", name, "--in-place", "--run"); exit != exitLost {
		t.Fatalf("interrupted twice: exit code %d, want %d", exit, exitLost)
	}
	if got := state(t, m); got == qemu.StateRunning {
		t.Errorf("the machine is %s", got)
	}
	if got := failed(s, records, exitLost, "capture", name, "--name", "torn"); got.Code != jobs.CodeLost {
		t.Errorf("capture: %+v", got)
	}
	if got := machineOf(s, records, m.PID); got.MemoryInvalid == "" {
		t.Errorf("machines: %+v", got)
	}
	if said := s.warned(records, "release", name); !strings.Contains(said, "is invalid") || !strings.Contains(said, "the mark stays") {
		t.Errorf("release says: %q", said)
	}
	if got := process[jobs.ReleaseResult](s, records, 0, "release", name); got.MemoryInvalid == "" {
		t.Errorf("released: %+v", got)
	}
	// Somebody lets it run all the same.
	if err := m.Continue(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := failed(s, records, exitLost, "restore", "base", name)
	if got.Code != jobs.CodeLost || !strings.Contains(got.Message, "the machine is running") || !strings.Contains(got.Message, "is invalid") {
		t.Errorf("restore into a running machine whose memory is invalid: %+v", got)
	}
	process[restoreJSON](s, records, 0, "restore", "base", name, "--in-place", "--run")
	goesOn(t, m)
	if said := s.warned(records, "release", name); said != "" {
		t.Errorf("release of a whole machine says: %q", said)
	}
	process[captureJSON](s, records, 0, "capture", name, "--name", "next", "--mode", "incremental")
}
