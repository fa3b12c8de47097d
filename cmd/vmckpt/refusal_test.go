package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// refusal is a command that must fail on a machine, and what its user is told.
type refusal struct {
	name    string
	machine machine.Options
	image   bool // there is one of the machine, "base", and tracking was taken out again
	prepare func(t *testing.T, s *shell, m *machine.Machine)
	args    []string // $VM is the machine's name

	exit    int
	code    jobs.Code
	message []string // what the error names
	hint    string   // what it says to do
	touched bool     // tracking may have begun: it was found out too late for leaving QEMU alone
}

// TestRefusals goes through what a capture and a restore do not do, on a real machine each: the exit code and the words that are promised, the
// guest goes on, and QEMU is as it was.
func TestRefusals(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not available here: root")
	}
	small := machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{
		Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, Spin: 100_000},
	}}
	with := func(args ...string) machine.Options {
		o := small
		o.Args = args
		return o
	}
	paused, shared := small, small
	paused.Paused = true
	shared.Memory = machine.Memfd
	var (
		virtioMem   = with("-m", "64,maxmem=256M", "-object", "memory-backend-ram,id=d,size=64M", "-device", "virtio-mem-pci,memdev=d")
		blocked     = with("-device", "nvme,serial=x") // its state cannot be saved
		badManifest = func(t *testing.T, s *shell, m *machine.Machine) { s.flip(s.file("base", "manifest.json"), 100) }
		badPages    = func(t *testing.T, s *shell, m *machine.Machine) { s.flip(s.file("base", ".pages"), 100_000) }
	)
	for _, c := range []refusal{
		{name: "capture, no such VM", machine: small, args: []string{"capture", "nobody"},
			exit: exitNotFound, code: jobs.CodeNoVM, message: []string{"nobody"}, hint: "name a QEMU that runs on this host"},
		{name: "capture, prelaunch", machine: paused, args: []string{"capture", "$VM"},
			exit: exitRefused, code: jobs.CodeState, message: []string{"prelaunch"}, hint: "try again when the VM is in another state"},
		{name: "capture, migration blocker", machine: blocked, args: []string{"capture", "$VM"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"QEMU says", "nvme"}, hint: "the message names each reason"},
		{name: "capture, virtio-mem", machine: virtioMem, args: []string{"capture", "$VM"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"virtio-mem"}, hint: "the message names each reason"},
		{name: "capture, shared writer", machine: shared, prepare: mapSharedMemory, args: []string{"capture", "$VM"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"process", "can write RAM block"}, hint: "the message names each reason"},
		{name: "capture, volume full", machine: small, prepare: fullVolume, args: []string{"capture", "$VM", "--compression", "none"},
			exit: exitNoSpace, code: jobs.CodeNoSpace, message: []string{"MiB"}, hint: "`vmckpt delete` images", touched: true},
		{name: "capture, wrong key", machine: small, image: true, prepare: otherKey, args: []string{"capture", "$VM", "--parent", "base", "--mode", "incremental"},
			exit: exitDamaged, code: jobs.CodeWrongKey, message: []string{"base", "another key"}, hint: "use the key file", touched: true},
		{name: "capture, parent damaged", machine: small, image: true, prepare: badManifest, args: []string{"capture", "$VM", "--mode", "incremental"},
			exit: exitRefused, code: jobs.CodeParent, message: []string{"base", "manifest.json"}, hint: "--mode full", touched: true},

		{name: "restore, no such VM", machine: small, image: true, args: []string{"restore", "base", "nobody"},
			exit: exitNotFound, code: jobs.CodeNoVM, message: []string{"nobody"}, hint: "name a QEMU that runs on this host"},
		{name: "restore, no such image", machine: small, image: true, args: []string{"restore", "nothing", "$VM", "--in-place"},
			exit: exitNotFound, code: jobs.CodeNotFound, message: []string{"nothing"}, hint: "`vmckpt list`"},
		{name: "restore, running", machine: small, image: true, args: []string{"restore", "base", "$VM"},
			exit: exitRefused, code: jobs.CodeState, message: []string{"running"}, hint: "--in-place"},
		{name: "restore, wrong key", machine: small, image: true, prepare: otherKey, args: []string{"restore", "base", "$VM", "--in-place"},
			exit: exitDamaged, code: jobs.CodeWrongKey, message: []string{"base", "key"}, hint: "use the key file"},
		{name: "restore, image damaged", machine: small, image: true, prepare: badPages, args: []string{"restore", "base", "$VM", "--in-place"},
			exit: exitDamaged, code: jobs.CodeDamaged, message: []string{"base", ".pages"}, hint: "restore from another image"},
		{name: "restore, migration blocker", machine: blocked, prepare: imageOfOther(small), args: []string{"restore", "base", "$VM", "--in-place"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"QEMU says", "nvme"}, hint: "the message names each reason"},
		{name: "restore, virtio-mem", machine: virtioMem, prepare: imageOfOther(small), args: []string{"restore", "base", "$VM", "--in-place"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"virtio-mem"}, hint: "the message names each reason"},
		{name: "restore, shared writer", machine: shared, image: true, prepare: mapSharedMemory, args: []string{"restore", "base", "$VM", "--in-place"},
			exit: exitRefused, code: jobs.CodeRefused, message: []string{"process", "can write RAM block"}, hint: "the message names each reason"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, records := newShell(t), t.TempDir()
			m := machine.Start(t, c.machine)
			name := m.Options().Name
			if c.image {
				goesOn(t, m)
				process[captureJSON](s, records, 0, "capture", name, "--name", "base")
				process[jobs.ReleaseResult](s, records, 0, "release", name)
			}
			if c.prepare != nil {
				c.prepare(t, s, m)
			}
			before := state(t, m)
			for i := range c.args {
				c.args[i] = strings.ReplaceAll(c.args[i], "$VM", name)
			}

			got := failed(s, records, c.exit, c.args...)
			if got.Code != c.code {
				t.Errorf("code %s, want %s", got.Code, c.code)
			}
			for _, want := range c.message {
				if !strings.Contains(got.Message, want) {
					t.Errorf("the message does not name %q: %s", want, got.Message)
				}
			}
			if !strings.Contains(got.Hint, c.hint) {
				t.Errorf("the hint does not say %q: %s", c.hint, got.Hint)
			}
			t.Logf("%s\nhint: %s", got.Message, got.Hint)

			if now := state(t, m); now != before {
				t.Errorf("the machine was %s, and is %s", before, now)
			}
			if n := userfaultfds(t, m.PID); n != 0 && !c.touched {
				t.Errorf("%d userfaultfds are in a QEMU that was not to be touched", n)
			}
			for _, where := range []string{"tmp", "images"} {
				left, err := os.ReadDir(filepath.Join(s.repo, where))
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range left {
					if l.Name() != "base" {
						t.Errorf("left in the repository's %s: %s", where, l.Name())
					}
				}
			}
			if before == qemu.StatePrelaunch {
				if err := m.Continue(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := m.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			goesOn(t, m)
		})
	}
}

// mapSharedMemory makes this process one that can write the machine's memory.
func mapSharedMemory(t *testing.T, s *shell, m *machine.Machine) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(m.PID), "fd/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if to, err := os.Readlink(path); err != nil || !strings.Contains(to, "memory-backend-memfd") {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b, err := unix.Mmap(int(f.Fd()), 0, int(m.Options().MemoryBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Munmap(b) }) //nolint:errcheck // it goes with the test
		return
	}
	t.Fatal("the machine has no shared memory")
}

// fullVolume moves the repository to a volume on which the machine has no room.
func fullVolume(t *testing.T, s *shell, m *machine.Machine) {
	t.Helper()
	volume := t.TempDir()
	if err := unix.Mount("none", volume, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("not available here: mounting a small volume: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(volume, unix.MNT_DETACH) }) //nolint:errcheck // the directory cannot be removed else, and that is told
	s.repo = filepath.Join(volume, "repository")
	s.ok("init")
	if _, err := m.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > 4_000 }); err != nil {
		t.Fatal(err)
	}
}

// otherKey forgets the repository's key for a new one.
func otherKey(t *testing.T, s *shell, _ *machine.Machine) {
	t.Helper()
	other := newShell(t)
	s.key = other.key
}

// imageOfOther makes the image "base" of another machine.
func imageOfOther(o machine.Options) func(*testing.T, *shell, *machine.Machine) {
	return func(t *testing.T, s *shell, _ *machine.Machine) {
		t.Helper()
		other := machine.Start(t, o)
		process[captureJSON](s, t.TempDir(), 0, "capture", other.Options().Name, "--name", "base")
	}
}
