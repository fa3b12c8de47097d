package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// libvirtd is a libvirt of the test's own, as virt-launcher runs one: unprivileged, in a mount namespace with a /run of
// its own, reached through the root of a process in there.
type libvirtd struct {
	cmd    *exec.Cmd
	socket string // seen from here
}

func startLibvirtd(t *testing.T) *libvirtd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for a mount namespace")
	}
	for _, tool := range []string{"libvirtd", "unshare", "setpriv", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is missing", tool)
		}
	}
	script := `set -e
mount -t tmpfs -o mode=0755,uid=65534,gid=65534 tmpfs /run
mkdir -p /run/home/libvirt
echo 'stdio_handler = "file"' >/run/home/libvirt/qemu.conf
chown -R 65534:65534 /run/home
exec setpriv --reuid 65534 --regid 65534 --clear-groups \
	env -i PATH="$PATH" HOME=/run/home XDG_RUNTIME_DIR=/run XDG_CONFIG_HOME=/run/home XDG_CACHE_HOME=/run/home XDG_DATA_HOME=/run/home libvirtd`
	l := &libvirtd{cmd: exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script)}
	var said bytes.Buffer
	l.cmd.Stderr = &said
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { l.cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		l.cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("libvirtd said: %s", &said)
		}
	})
	l.socket = fmt.Sprintf("/proc/%d/root/run/libvirt/libvirt-sock", l.cmd.Process.Pid)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", l.socket)
		if err == nil {
			conn.Close()
			return l
		}
		select {
		case <-exited:
			t.Fatalf("libvirtd ended: %s", &said)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("libvirtd does not listen: %v", err)
		}
	}
}

// create starts a domain without disks or network, and returns its process.
func (l *libvirtd) create(t *testing.T, name string) *Process {
	t.Helper()
	conn, err := net.Dial("unix", l.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	rpc := libvirt.NewWithDialer(connected{conn})
	if err := rpc.ConnectToURI(libvirt.QEMUSession); err != nil {
		t.Fatal(err)
	}
	xml := fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>32</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/><memballoon model='virtio'/></devices></domain>`, name)
	if _, err := rpc.DomainCreateXML(xml, 0); err != nil {
		t.Fatal(err)
	}
	p, err := Find(t.Context(), Selector{Guest: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if proc, err := os.FindProcess(p.PID); err == nil && p.Alive() {
			proc.Kill()
		}
	})
	return p
}

func TestLibvirt(t *testing.T) {
	l := startLibvirtd(t)
	name := fmt.Sprintf("default_vmckpt-%d", os.Getpid())
	p := l.create(t, name)
	if !p.Libvirt || len(p.QMPPaths) > 0 || p.UUID == "" {
		t.Fatalf("process is %+v", p)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()

	m, err := DialProcess(ctx, p, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	sub := m.Subscribe()
	for _, c := range []string{"stop", "cont"} {
		if err := m.Execute(ctx, c, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"STOP", "RESUME"} {
		select {
		case ev := <-sub.C:
			if age := time.Since(ev.Time); ev.Name != want || age < 0 || age > time.Minute {
				t.Errorf("event %+v, want %s", ev, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("no %s", want)
		}
	}
	var refused *QMPError
	if err := m.Execute(ctx, "no-such-command", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("an unknown command gave %v", err)
	}
	layout, err := ReadLayout(ctx, m, p)
	if err != nil || layout.Bytes() < 32<<20 {
		t.Errorf("layout %+v, %v", layout, err)
	}

	// A long command stops others, and not those who no longer wait for it.
	leash, end := p.fifo(t)
	done := make(chan error, 1)
	go func() { done <- SaveDeviceState(ctx, m, leash) }()
	head := make([]byte, 4)
	if _, err := end.Read(head); err != nil || string(head) != "QEVM" {
		t.Fatalf("stream begins with %q, %v", head, err)
	}
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	if _, err := Status(short, m); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command during the hold gave %v", err)
	}
	end.Close()
	if err := <-done; !errors.As(err, &refused) {
		t.Errorf("saving to a reader that went gave %v", err)
	}
	if s, err := Status(ctx, m); s != StateRunning || err != nil {
		t.Errorf("afterwards %q, %v", s, err)
	}

	if _, err := DialLibvirt(ctx, l.socket, "no-such-domain"); err == nil || !strings.Contains(err.Error(), "no-such-domain") {
		t.Errorf("a domain that is not there gave %v", err)
	}
	other := *p
	other.UUID = "00000000-0000-0000-0000-000000000000"
	var wrong *WrongProcessError
	if _, err := DialProcess(ctx, &other, DialOptions{LibvirtSocket: l.socket}); !errors.As(err, &wrong) {
		t.Errorf("another QEMU's monitor gave %v", err)
	}

	l.cmd.Process.Kill()
	for {
		if _, ok := <-sub.C; !ok {
			break
		}
	}
	if sub.Err() == nil {
		t.Error("subscription outlived libvirt without an error")
	}
	if _, err := Status(ctx, m); err == nil {
		t.Error("a command to a dead libvirt succeeded")
	}
}

// fifo makes a named pipe where the process can open it, and opens its reading end.
func (p *Process) fifo(t *testing.T) (name string, r *os.File) {
	t.Helper()
	name = "/run/home/leash"
	here := filepath.Join(p.dir(), "root", name)
	if out, err := exec.Command("mkfifo", "-m", "666", here).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r, err := os.OpenFile(here, os.O_RDWR, fs.ModeNamedPipe) // both ends, so that the open waits for nobody
	if err != nil {
		t.Fatal(err)
	}
	return name, r
}
