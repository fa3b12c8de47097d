package qemu

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// libvirtSockets are where a libvirt listens in the file system of its QEMU: the modular daemon, then the old one; an
// ordinary host and virt-launcher's pod have them in the same places.
var libvirtSockets = []string{
	"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock",
	"/var/run/libvirt/virtqemud-sock", "/var/run/libvirt/libvirt-sock",
}

// DialOptions says how to reach a QEMU, where that is not to be found out.
type DialOptions struct {
	LibvirtSocket string // path on this machine
	QMPSocket     string // path on this machine

	// Socket, of [NewSocket], is what a plain QMP socket is dialled by, where a supervisor holds it too. DialProcess takes it over.
	Socket *os.File
}

// DialProcess connects to the monitor of p: through libvirt where libvirt started it, else by a QMP socket of its own. The
// sockets are looked for beneath the root of the process. That the monitor is that of p is made sure of.
func DialProcess(ctx context.Context, p *Process, opts DialOptions) (Monitor, error) {
	dialUnix := DialUnix
	if opts.Socket != nil {
		defer opts.Socket.Close()
		dialUnix = opts.dialOnce
	}
	switch {
	case opts.QMPSocket != "":
		m, err := dialUnix(ctx, opts.QMPSocket)
		return p.confirm(ctx, m, err)
	case opts.LibvirtSocket != "":
		m, err := DialLibvirt(ctx, opts.LibvirtSocket, p.Guest)
		return p.confirm(ctx, m, err)
	}
	var errs dialErrors
	try := func(paths []string, dial func(ctx context.Context, path string) (Monitor, error)) Monitor {
		for _, name := range paths {
			m, err := p.dialBeneath(ctx, name, dial)
			if m, err = p.confirm(ctx, m, err); err == nil {
				return m
			}
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		return nil
	}
	if p.Libvirt {
		m := try(libvirtSockets, func(ctx context.Context, path string) (Monitor, error) { return DialLibvirt(ctx, path, p.Guest) })
		if m != nil {
			return m, nil
		}
	}
	if m := try(p.QMPPaths, dialUnix); m != nil {
		return m, nil
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("qemu %v has no monitor to connect to: neither libvirt's nor -qmp unix:PATH", p)
	}
	return nil, errs
}

// dialErrors are the ways to a monitor that were tried, and what became of each; on one line, as an error is.
type dialErrors []error

func (e dialErrors) Error() string {
	var texts []string
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

func (e dialErrors) Unwrap() []error { return e }

// dialOnce dials by the socket given, and by one of its own once that has been connected: it turned out to be another machine's.
func (o *DialOptions) dialOnce(ctx context.Context, path string) (Monitor, error) {
	if wasConnected(o.Socket) {
		return DialUnix(ctx, path)
	}
	own := -1
	err := control(o.Socket, func(fd int) (err error) {
		own, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("duplicate the monitor's socket: %w", err)
	}
	return DialOn(ctx, os.NewFile(uintptr(own), o.Socket.Name()), path)
}

// dialBeneath opens a socket by its path in the file system of the process and dials it. The path is resolved beneath the
// process's root, so that no link in there leads out of it, and the socket is then named by our handle to it.
func (p *Process) dialBeneath(ctx context.Context, name string, dial func(ctx context.Context, path string) (Monitor, error)) (Monitor, error) {
	if !strings.HasPrefix(name, "/") { // relative to where QEMU was started
		cwd, err := os.Readlink(filepath.Join(p.dir(), "cwd"))
		if err != nil {
			return nil, err
		}
		name = path.Join(cwd, name)
	}
	root, err := os.OpenFile(filepath.Join(p.dir(), "root"), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	socket, err := openBeneath(root, name)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	if !p.Alive() { // or root is that of another process by now
		return nil, fmt.Errorf("the process has ended: %w", fs.ErrNotExist)
	}
	return dial(ctx, fmt.Sprintf("/proc/self/fd/%d", socket.Fd()))
}

// openBeneath opens a socket for nothing but naming it. Absolute links and ".." stay within root (openat2(2),
// RESOLVE_IN_ROOT).
func openBeneath(root *os.File, name string) (*os.File, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(int(root.Fd()), name, how)
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if info.Mode().Type() != fs.ModeSocket {
		f.Close()
		return nil, fmt.Errorf("%s is not a socket", name)
	}
	return f, nil
}

// WrongProcessError says that a monitor was reached, and that it is another QEMU's.
type WrongProcessError struct {
	Wanted *Process
	Found  string
}

func (e *WrongProcessError) Error() string {
	return fmt.Sprintf("the monitor is not that of qemu %v but of %s", e.Wanted, e.Found)
}

// confirm makes sure that a monitor just reached is that of p: a plain socket by the pid of who listens, libvirt by what the
// QEMU says of itself.
func (p *Process) confirm(ctx context.Context, m Monitor, err error) (Monitor, error) {
	if err != nil {
		return nil, err
	}
	if err := p.confirmed(ctx, m); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (p *Process) confirmed(ctx context.Context, m Monitor) error {
	if s, ok := m.(*socketMonitor); ok {
		pid, err := peer(s.conn)
		if err != nil {
			return fmt.Errorf("ask who listens on the socket: %w", err)
		}
		if pid != p.PID {
			return &WrongProcessError{p, fmt.Sprintf("pid %d", pid)}
		}
		return nil
	}
	var name struct {
		Name string `json:"name"`
	}
	var uuid struct {
		UUID string `json:"UUID"`
	}
	if err := m.Execute(ctx, "query-name", nil, &name); err != nil {
		return err
	}
	if err := m.Execute(ctx, "query-uuid", nil, &uuid); err != nil {
		return err
	}
	if name.Name != p.Guest || p.UUID != "" && !strings.EqualFold(uuid.UUID, p.UUID) {
		return &WrongProcessError{p, fmt.Sprintf("guest %q with uuid %s", name.Name, uuid.UUID)}
	}
	return nil
}

// peer is the pid of the process at the other end of a unix socket: the one that called listen (unix(7), SO_PEERCRED).
func peer(conn net.Conn) (int, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}
