package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The worker and the holder speak over a pair of SOCK_SEQPACKET sockets: one packet a message, a byte for its kind and a number.

type kind byte

const (
	// From the worker to the holder.
	kindRelease kind = 'r' // read on, to the end; number unused
	kindExtend  kind = 'x' // a new bound for the hold from now on, nanoseconds
	kindFinish  kind = 'f' // QEMU has answered: what is in the pipe now is the rest; number unused

	// From the holder to the worker.
	kindArmed kind = 'a' // ready: the reader is there, the timer runs; number unused
	kindFirst kind = '1' // the first byte came: the machine stands; number unused
	kindHeld  kind = 'h' // all but the rest is read, number: bytes so far
	kindDone  kind = 'd' // after kindFinish: the length of the stream, bytes
	kindError kind = 'e' // an errno of the holder's; it ends
)

type message struct {
	kind   kind
	number uint64
}

const messageBytes = 9

// errClosed says that the other side of the control socket is gone.
var errClosed = errors.New("the control socket is closed")

func (m message) String() string { return fmt.Sprintf("%q(%d)", rune(m.kind), m.number) }

// send writes one message to the control socket fd.
func send(fd int, m message) error {
	var b [messageBytes]byte
	b[0] = byte(m.kind)
	binary.LittleEndian.PutUint64(b[1:], m.number)
	for {
		err := unix.Sendto(fd, b[:], unix.MSG_NOSIGNAL, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("sendto", err)
		default:
			return nil
		}
	}
}

// receive reads one message from the control socket fd, waiting for it. It returns errClosed when the other side is gone.
func receive(fd int) (message, error) {
	var b [messageBytes]byte
	for {
		n, _, err := unix.Recvfrom(fd, b[:], 0)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return message{}, os.NewSyscallError("recvfrom", err)
		case n == 0:
			return message{}, errClosed
		case n != messageBytes:
			return message{}, fmt.Errorf("a control message of %d bytes, want %d", n, messageBytes)
		default:
			return message{kind(b[0]), binary.LittleEndian.Uint64(b[1:])}, nil
		}
	}
}
