package machine

import (
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

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Machine is a QEMU that was started here.
type Machine struct {
	PID     int
	Monitor qemu.Monitor // the test's own
	Serial  *Serial

	// Socket is what the product may connect to: a QMP socket, or libvirt's where libvirt started the machine.
	Socket string

	// Domain is what libvirt knows the machine by; "" where it was started without.
	Domain string

	options Options
	dir     string
	process *process

	mu        sync.Mutex
	addresses map[uint64]uint64 // host address of each gpa asked for
}

// Start starts a machine that ends with the test, and skips the test where the machine cannot be had. A guest that is not
// started Paused is at work when Start returns. When the test fails, its log shows the machine's output.
func Start(t testing.TB, o Options) *Machine {
	t.Helper()
	m, err := Launch(t.Context(), o)
	return attend(t, m, err)
}

// attend binds a machine that was launched to a test.
func attend(t testing.TB, m *Machine, err error) *Machine {
	t.Helper()
	if missing := (*Unavailable)(nil); errors.As(err, &missing) {
		t.Skip(missing)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("machine %s:\n%s", m.options.Name, m.Report())
		}
		if err := m.Close(); err != nil {
			t.Errorf("end machine %s: %v", m.options.Name, err)
		}
	})
	return m
}

// preparation is what a guest gets to make its files.
type preparation struct {
	ctx     context.Context
	options Options
	cache   string
	dir     string
}

// readyTimeout bounds how long a guest may take until it is at work: Debian's kernel takes 3 s under TCG on an idle
// machine.
const readyTimeout = 2 * time.Minute

// guestCache is where in the cache directory built guests are kept.
const guestCache = "guest"

// newMachine makes a machine's directory beneath parent ("" for the system's own), with the disk in it. o has its
// defaults.
func newMachine(o Options, parent string) (*Machine, error) {
	dir, err := os.MkdirTemp(parent, "vmckpt-") // not t.TempDir(): a socket's path must be short
	if err != nil {
		return nil, err
	}
	m := &Machine{Socket: filepath.Join(dir, productSocket), dir: dir, addresses: map[uint64]uint64{}}
	m.Serial = &Serial{m: m, path: filepath.Join(dir, serialFile)}
	if o.Disk != nil && o.Disk.Path == "" {
		o.Disk.Path = filepath.Join(dir, diskFile) // withDefaults made the copy that is changed here
		if err := makeDisk(o.Disk.Path, o.Disk.Bytes); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	m.options = o
	return m, nil
}

// Launch starts a machine; Close ends it. Where something is missing for it the error is *Unavailable.
func Launch(ctx context.Context, o Options) (_ *Machine, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start machine %s: %w", o.Name, err)
		}
	}()
	if err := UsableAccel(o.Accel); err != nil {
		return nil, err
	}
	binary, err := FindQEMU(ctx, o.QEMU)
	if err != nil {
		return nil, err
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	m, err := newMachine(o, "")
	if err != nil {
		return nil, err
	}
	o = m.options
	guest, err := o.Guest.prepare(&preparation{ctx: ctx, options: o, cache: filepath.Join(cache, guestCache), dir: m.dir})
	if err == nil {
		err = m.run(binary, o.arguments(m.dir, guest))
	}
	if errors.Is(err, exec.ErrNotFound) {
		err = &Unavailable{err.Error()}
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	err = m.await(ctx, func(ctx context.Context) (qemu.Monitor, error) {
		return qemu.DialUnix(ctx, filepath.Join(m.dir, testSocket))
	})
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, m.Report())
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Available returns what keeps a machine from being started here, as an *[Unavailable], or nil. It makes the guest's files, as starting does.
func Available(ctx context.Context, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	if err := UsableAccel(o.Accel); err != nil {
		return err
	}
	if _, err := FindQEMU(ctx, o.QEMU); err != nil {
		return err
	}
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "vmckpt-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	_, err = o.Guest.prepare(&preparation{ctx: ctx, options: o, cache: filepath.Join(cache, guestCache), dir: dir})
	if errors.Is(err, exec.ErrNotFound) {
		err = &Unavailable{err.Error()}
	}
	return err
}

// run starts QEMU.
func (m *Machine) run(binary string, args []string) error {
	output, err := os.Create(filepath.Join(m.dir, outputFile))
	if err != nil {
		return err
	}
	defer output.Close()
	fmt.Fprintln(output, binary, shellWords(args))
	// Not bound to a context: a test ends the machine by Close, which also waits for it.
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = output, output
	if m.process, err = startChild(cmd); err != nil {
		return err
	}
	m.PID = m.process.pid
	return nil
}

// await connects the test's monitor and waits until the guest is at work.
func (m *Machine) await(ctx context.Context, dial func(context.Context) (qemu.Monitor, error)) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		monitor, err := dial(ctx)
		if err == nil {
			m.Monitor = monitor
			break
		}
		if stopped := m.pollAgain(ctx); stopped != nil {
			return fmt.Errorf("wait for the monitor: %w", errors.Join(stopped, err))
		}
	}
	if m.options.Paused {
		return nil
	}
	return m.Ready(ctx)
}

// Dial connects to the machine the product's way: to its QMP socket, which takes one client at a time, or through libvirt.
func (m *Machine) Dial(ctx context.Context) (qemu.Monitor, error) {
	if m.Domain != "" {
		return qemu.DialLibvirt(ctx, m.Socket, m.Domain)
	}
	return qemu.DialUnix(ctx, m.Socket)
}

// Ready waits until the guest is at work: it said so on its serial console.
func (m *Machine) Ready(ctx context.Context) error {
	prefix := "writer: ready"
	if _, linux := m.options.Guest.(Linux); linux {
		prefix = "init: ready"
	}
	_, _, err := m.Serial.WaitLine(ctx, 0, func(line string) bool { return strings.HasPrefix(line, prefix) })
	return err
}

// pollAgain waits a moment. It fails when the machine has ended, or the context.
func (m *Machine) pollAgain(ctx context.Context) error { return m.process.pollAgain(ctx) }

// Options returns the machine's description, all defaults filled in.
func (m *Machine) Options() Options { return m.options }

// Twin returns the description of a machine to restore this one's images into: the same, standing still. Its disk is this
// machine's, so that one must not be closed before.
func (m *Machine) Twin() Options {
	o := m.options
	o.Paused = true
	return o
}

// Dir returns the machine's directory: sockets and logs. It goes with Close.
func (m *Machine) Dir() string { return m.dir }

// Exited is closed when QEMU has ended.
func (m *Machine) Exited() <-chan struct{} { return m.process.exited }

// Stop stops the guest by the test's monitor.
func (m *Machine) Stop(ctx context.Context) error { return m.Monitor.Execute(ctx, "stop", nil, nil) }

// Continue lets the guest run, by the test's monitor.
func (m *Machine) Continue(ctx context.Context) error {
	return m.Monitor.Execute(ctx, "cont", nil, nil)
}

// Kill kills QEMU and waits for its end; what is in its directory stays until Close.
func (m *Machine) Kill() error {
	if m.process == nil {
		return nil
	}
	return m.process.kill()
}

// Close ends the machine and removes its directory. It may be called more than once.
func (m *Machine) Close() error {
	if m.Monitor != nil {
		m.Monitor.Close()
	}
	return errors.Join(m.Kill(), os.RemoveAll(m.dir))
}

// Report returns the end of what QEMU and the guest printed.
func (m *Machine) Report() string {
	var b strings.Builder
	for _, name := range []string{outputFile, serialFile} {
		if text := tail(filepath.Join(m.dir, name)); text != "" {
			fmt.Fprintf(&b, "%s:\n%s\n", name, text)
		}
	}
	return b.String()
}

// tailLines is how much of a log a report shows.
const tailLines = 40

// tail returns the end of a log, indented; nothing where there is none.
func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if skipped := len(lines) - tailLines; skipped > 0 {
		lines = append([]string{fmt.Sprintf("(%d lines before)", skipped)}, lines[skipped:]...)
	}
	return "  " + strings.Join(lines, "\n  ")
}
