package machine

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Libvirt is a libvirt daemon of our own, in mount and process namespaces of its own, much as KubeVirt's virt-launcher runs
// it in a pod: without privileges, as uid 107, its socket at /run/libvirt. Nothing of the system's libvirt is touched. When
// the namespaces' first process ends, all that runs in them does, QEMU included.
type Libvirt struct {
	dir    string
	pid    int // of the namespaces' first process, as this process sees it
	outer  *process
	socket string // as this process sees it, beneath the root of pid
	rpc    *libvirt.Libvirt
}

// What the daemon's namespaces look like from within; libvirt-namespace.sh makes it so.
const (
	libvirtUID   = 107
	cacheInside  = "/run/vmckpt" // the cache directory: the daemon's user may not reach it where it is
	daemonSocket = "/run/libvirt/libvirt-sock"
)

//go:embed libvirt-namespace.sh
var namespaceScript string

// StartLibvirt starts a daemon that ends with the test, and skips the test where it cannot be had.
func StartLibvirt(t testing.TB) *Libvirt {
	t.Helper()
	l, err := LaunchLibvirt(t.Context())
	if missing := (*Unavailable)(nil); errors.As(err, &missing) {
		t.Skip(missing)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("libvirt:\n%s", tail(filepath.Join(l.dir, "libvirtd.log")))
		}
		if err := l.Close(); err != nil {
			t.Errorf("end libvirt: %v", err)
		}
	})
	return l
}

// LaunchLibvirt starts a daemon; Close ends it. Where something is missing for it the error is *Unavailable.
func LaunchLibvirt(ctx context.Context) (_ *Libvirt, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start libvirt: %w", err)
		}
	}()
	if os.Geteuid() != 0 {
		return nil, &Unavailable{"root, for libvirt's own namespaces"}
	}
	daemon, err := exec.LookPath("libvirtd")
	if err != nil {
		return nil, &Unavailable{"libvirtd (run hack/setup)"}
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "vmckpt-libvirt-")
	if err != nil {
		return nil, err
	}
	l := &Libvirt{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w\n%s", err, tail(filepath.Join(dir, "libvirtd.log"))), l.Close())
		}
	}()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, libvirtUID, libvirtUID)); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "libvirtd.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc",
		"sh", "-c", namespaceScript, "libvirt-namespace", daemon, dir, cache, cacheInside, strconv.Itoa(libvirtUID))
	cmd.Stdout, cmd.Stderr = log, log
	if l.outer, err = startChild(cmd); err != nil {
		return nil, err
	}
	if err := l.connect(ctx); err != nil {
		return nil, err
	}
	return l, nil
}

// daemonTimeout bounds how long the daemon may take until it answers.
const daemonTimeout = 30 * time.Second

func (l *Libvirt) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	for {
		err := l.tryConnect(ctx)
		if err == nil {
			return nil
		}
		if stopped := l.outer.pollAgain(ctx); stopped != nil {
			return fmt.Errorf("connect to the daemon: %w", errors.Join(stopped, err))
		}
	}
}

func (l *Libvirt) tryConnect(ctx context.Context) error {
	if l.pid == 0 {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", l.outer.pid))
		if err != nil {
			return err
		}
		pid := 0
		if _, err := fmt.Sscan(string(children), &pid); err != nil {
			return errors.New("the namespaces' first process is not there yet")
		}
		l.pid = pid
		l.socket = fmt.Sprintf("/proc/%d/root%s", pid, daemonSocket)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", l.socket)
	if err != nil {
		return err
	}
	rpc := libvirt.NewWithDialer(openConnection{conn})
	if err := rpc.ConnectToURI(libvirt.QEMUSession); err != nil {
		return errors.Join(err, conn.Close())
	}
	l.rpc = rpc
	return nil
}

// openConnection is a connection in the shape of what libvirt's library dials with.
type openConnection struct{ net.Conn }

func (c openConnection) Dial() (net.Conn, error) { return c.Conn, nil }

// Socket is the path of the daemon's socket in this process's view.
func (l *Libvirt) Socket() string { return l.socket }

// Start starts a machine as a domain of the daemon; it ends with the test, at the latest. Its Monitor speaks through
// libvirt, its Socket is the daemon's.
func (l *Libvirt) Start(t testing.TB, o Options) *Machine {
	t.Helper()
	m, err := l.Launch(t.Context(), o)
	return attend(t, m, err)
}

// Launch starts a machine as a domain of the daemon. Close ends it.
func (l *Libvirt) Launch(ctx context.Context, o Options) (_ *Machine, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start domain %s: %w", o.Name, err)
		}
	}()
	m, err := newMachine(o, l.dir)
	if err != nil {
		return nil, err
	}
	m.Socket, m.Domain = l.socket, o.Name
	if err := chownAll(m.dir); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	xml, err := l.describe(ctx, m)
	if err == nil {
		err = l.create(ctx, m, xml)
	}
	if err == nil {
		err = m.await(ctx, func(ctx context.Context) (qemu.Monitor, error) {
			return m.Dial(ctx)
		})
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, m.Report())
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Resume has the daemon resume a machine, as whoever manages domains does: the daemon goes by its own idea of the machine's state.
func (l *Libvirt) Resume(name string) error {
	domain, err := l.rpc.DomainLookupByName(name)
	if err != nil {
		return err
	}
	return l.rpc.DomainResume(domain)
}

// chownAll gives a directory and the files in it to the daemon's user.
func chownAll(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	for _, path := range append(files, dir) {
		err = errors.Join(err, os.Chown(path, libvirtUID, libvirtUID))
	}
	return err
}

// create has the daemon start the domain, and finds its QEMU.
func (l *Libvirt) create(ctx context.Context, m *Machine, xml string) error {
	flags := libvirt.DomainNone
	if m.options.Paused {
		flags = libvirt.DomainStartPaused
	}
	l.forgotten(ctx, m.options.Name)
	if _, err := l.rpc.DomainCreateXML(xml, flags); err != nil {
		return fmt.Errorf("%w; the domain was\n%s", err, xml)
	}
	// Another daemon may run a domain of that name, so QEMU is looked for by its uuid.
	p, err := qemu.Find(ctx, qemu.Selector{UUID: m.options.UUID})
	if err != nil {
		return err
	}
	m.PID = p.PID
	m.process, err = adopt(p.PID)
	return err
}

// forgotten waits until the daemon knows no domain of the name: it takes a moment to notice that a QEMU was killed. Where
// the domain stays, the daemon itself will say so.
func (l *Libvirt) forgotten(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		if _, err := l.rpc.DomainLookupByName(name); err != nil || l.outer.pollAgain(ctx) != nil {
			return
		}
	}
}

// Close ends the daemon with all its domains, and removes its directory.
func (l *Libvirt) Close() error {
	var err error
	if l.rpc != nil {
		l.rpc.Disconnect() // fails when the daemon is gone already, which is no matter
	}
	if l.outer != nil {
		err = l.outer.kill()
	}
	// The namespaces' first process is killed by the kernel after that; all its processes are gone when it is.
	for deadline := time.Now().Add(daemonTimeout); l.pid != 0 && time.Now().Before(deadline); time.Sleep(pollInterval) {
		if _, gone := os.Stat(fmt.Sprintf("/proc/%d", l.pid)); gone != nil {
			break
		}
	}
	return errors.Join(err, os.RemoveAll(l.dir))
}
