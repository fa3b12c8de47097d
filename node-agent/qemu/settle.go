package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A client of a plain QMP socket must not go while a command of its is under way: that can kill QEMU. Seen on QEMU 10.0.2, with no part of
// ours in it: the monitor's I/O thread hands a command to the main thread and is not done with its parser; the main thread is faster, finds
// that nobody is there to take the answer, and destroys the parser under it (chardev/char-socket.c, tcp_chr_write and
// tcp_chr_disconnect_locked; monitor/qmp.c, monitor_qmp_event; qobject/json-streamer.c). Both processors busy, it takes some hundreds of such
// ends. libvirt's monitors never end so.
//
// So Close waits for the answers. For a process that is killed, another one, its supervisor, holds the same socket: NewSocket before the
// process is started, DialOn in it, Settle when it is gone.

// settleBound is how long the end of a connection waits for answers. What takes QEMU longer than that hangs.
const settleBound = 10 * time.Second

// NewSocket returns a socket for [DialOn], not connected yet.
func NewSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for the monitor: %w", err)
	}
	return os.NewFile(uintptr(fd), "monitor"), nil
}

// connect connects the socket, which stays the caller's.
func connect(ctx context.Context, socket *os.File, path string) (net.Conn, error) {
	const full = 10 * time.Millisecond // until the next try where the listener's backlog is full
	for {
		err := control(socket, func(fd int) error {
			if err := unix.SetNonblock(fd, true); err != nil {
				return err
			}
			return os.NewSyscallError("connect", unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
		})
		if err == nil {
			return net.FileConn(socket)
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		select {
		case <-time.After(full):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// wasConnected reports whether the socket ever was.
func wasConnected(socket *os.File) bool {
	return control(socket, func(fd int) error {
		_, err := unix.Getpeername(fd)
		return err
	}) == nil
}

// control does something to the descriptor of f, whose mode stays as it is.
func control(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// Settle waits until QEMU has answered all that was asked by a socket of [NewSocket] whose user is gone, ten seconds at the most, and closes
// it. A socket that was never connected, or whose user has closed the monitor, is closed at once.
func Settle(socket *os.File) {
	defer socket.Close()
	if !wasConnected(socket) {
		return
	}
	conn, err := net.FileConn(socket)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(settleBound)) //nolint:errcheck // a connection just made
	// Commands are answered in their order, so the answer to one more, an error or not, is the last.
	const mark = `"vmckpt-settled"`
	if _, err := io.WriteString(conn, `{"execute": "query-status", "id": `+mark+"}\n"); err != nil {
		return
	}
	// The user may have read half of a message: what comes is looked through for the mark, not parsed.
	buf := make([]byte, 64<<10)
	for kept := 0; ; {
		n, err := conn.Read(buf[kept:])
		if err != nil || bytes.Contains(buf[:kept+n], []byte(mark)) {
			return
		}
		n += kept
		kept = copy(buf, buf[max(0, n-len(mark)):n])
	}
}
