package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeProc is a procfs with processes of the test's making.
type fakeProc struct{ dir string }

func (f fakeProc) add(t *testing.T, pid int, state string, start uint64, args ...string) {
	t.Helper()
	dir := filepath.Join(f.dir, fmt.Sprint(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// A program may put parentheses and blanks into its name.
	stat := fmt.Sprintf("%d (a ) S 1) %s %s%d 0 0\n", pid, state, strings.Repeat("7 ", 18), start)
	for name, content := range map[string]string{"stat": stat, "cmdline": strings.Join(args, "\x00") + "\x00"} {
		if len(args) == 0 && name == "cmdline" {
			content = ""
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFind(t *testing.T) {
	proc := fakeProc{t.TempDir()}
	const qemu = "/usr/bin/qemu-system-x86_64"
	proc.add(t, 1, "S", 1, "/sbin/init")
	proc.add(t, 2, "S", 2) // a kernel thread
	proc.add(t, 10, "S", 100, qemu, "-name", "guest=ns_a,debug-threads=on", "-uuid", "AAAA")
	proc.add(t, 11, "R", 101, qemu, "-name", "ns_b", "-uuid", "bbbb")
	proc.add(t, 12, "S", 102, "qemu-kvm", "-name", "guest=ns_b")
	proc.add(t, 13, "Z", 103, qemu, "-name", "ns_a")
	proc.add(t, 14, "S", 104, "grep", "-name", "ns_a")
	if err := os.WriteFile(filepath.Join(proc.dir, "uptime"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		want Selector
		pid  int
		err  string
	}{
		"by name":              {Selector{Guest: "ns_a"}, 10, ""},
		"by uuid":              {Selector{UUID: "aaaa"}, 10, ""},
		"by pid":               {Selector{PID: 12}, 12, ""},
		"by name and uuid":     {Selector{Guest: "ns_b", UUID: "BBBB"}, 11, ""},
		"two of one name":      {Selector{Guest: "ns_b"}, 0, `more than one running QEMU with guest "ns_b": pid 11 (guest "ns_b"), pid 12 (guest "ns_b")`},
		"none of that name":    {Selector{Guest: "ns"}, 0, `no running QEMU with guest "ns"; there are: pid 10 (guest "ns_a"), pid 11 (guest "ns_b"), pid 12 (guest "ns_b")`},
		"a pid of no QEMU":     {Selector{PID: 14}, 0, "no running QEMU with pid 14; there are: "},
		"name and pid at odds": {Selector{Guest: "ns_a", PID: 11}, 0, `no running QEMU with guest "ns_a", pid 11; there are: `},
		"anything at all":      {Selector{}, 0, "more than one running QEMU with any guest: "},
	} {
		t.Run(name, func(t *testing.T) {
			c.want.Proc = proc.dir
			p, err := Find(t.Context(), c.want)
			if c.err == "" {
				if err != nil || p.PID != c.pid || p.StartTime != uint64(90+c.pid) || !p.Alive() {
					t.Fatalf("found %+v, %v", p, err)
				}
				return
			}
			var none *NoMatchError
			var many *AmbiguousError
			if err == nil || !strings.HasPrefix(err.Error(), c.err) || !errors.As(err, &none) && !errors.As(err, &many) {
				t.Errorf("got %v, want %q", err, c.err)
			}
		})
	}
}

// A pid that another process has got meanwhile is not the process any more; neither is a zombie.
func TestAlive(t *testing.T) {
	proc := fakeProc{t.TempDir()}
	proc.add(t, 10, "S", 100, "qemu-kvm")
	p, err := Find(t.Context(), Selector{PID: 10, Proc: proc.dir})
	if err != nil || !p.Alive() {
		t.Fatal(p, err)
	}
	proc.add(t, 10, "Z", 100, "qemu-kvm")
	if p.Alive() {
		t.Error("a zombie is alive")
	}
	proc.add(t, 10, "S", 101, "qemu-kvm")
	if p.Alive() {
		t.Error("another process with its pid counts")
	}
	if err := os.RemoveAll(filepath.Join(proc.dir, "10")); err != nil {
		t.Fatal(err)
	}
	if p.Alive() {
		t.Error("a process that is gone is alive")
	}
}

// A link planted in a pod must not lead out of it.
func TestOpenBeneath(t *testing.T) {
	outside, err := os.MkdirTemp("", "vmckpt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(outside) })
	inside := filepath.Join(outside, "root")
	for _, dir := range []string{"run/libvirt", "var"} {
		if err := os.MkdirAll(filepath.Join(inside, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	listen := func(name string) uint64 {
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		var s unix.Stat_t
		if err := unix.Stat(name, &s); err != nil {
			t.Fatal(err)
		}
		return s.Ino
	}
	listen(filepath.Join(outside, "sock"))
	good := listen(filepath.Join(inside, "run/libvirt/sock"))
	if err := os.WriteFile(filepath.Join(inside, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{
		"var/run":  "/run", // as in every pod: absolute, and meant within
		"out":      filepath.Join(outside, "sock"),
		"up":       "../sock",
		"far":      "../../../../../../../.." + outside + "/sock",
		"relative": "run/../run/libvirt/sock",
		"magic":    "/proc/self/root" + outside + "/sock",
	} {
		if err := os.Symlink(to, filepath.Join(inside, link)); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenFile(inside, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, ok := range map[string]bool{
		"/run/libvirt/sock": true, "/var/run/libvirt/sock": true, "/relative": true, "run/libvirt/sock": true,
		"/../../run/libvirt/sock": true, // ".." of the root is the root
		"/out":                    false, "/up": false, "/far": false, "/magic": false, "/../sock": false, "/file": false, "/run": false, "/none": false,
	} {
		f, err := openBeneath(root, name)
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil {
			continue
		}
		var s unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &s); err != nil || s.Ino != good {
			t.Errorf("%s: inode %d, %v", name, s.Ino, err)
		}
		f.Close()
	}
}

func TestDialProcess(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, e emulator) {
		g, other := e.start(t, nil, "-m", "32", "-S"), e.start(t, nil, "-m", "32", "-S")
		p := g.find(t)
		g.dial(t).Close()
		m, err := DialProcess(t.Context(), p, DialOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if s, err := Status(t.Context(), m); s != StatePrelaunch || err != nil {
			t.Errorf("status %q, %v", s, err)
		}
		m.Close()
		other.dial(t).Close()
		var wrong *WrongProcessError
		if _, err := DialProcess(t.Context(), p, DialOptions{QMPSocket: other.socket}); !errors.As(err, &wrong) {
			t.Errorf("another QEMU's socket gave %v", err)
		}
	})
}
