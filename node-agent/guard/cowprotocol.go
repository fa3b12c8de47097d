package guard

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The worker and the keeper of a guard speak over a pair of SOCK_SEQPACKET sockets as well: one packet is an order, a byte that says what is
// to be done and ranges of addresses that it is to be done with; or an answer, with numbers.

type order byte

const (
	// From the worker to the keeper; it answers all but orderTaken with answerDone, in order.
	orderRegister order = 'r' // register the ranges; the first order, and once
	orderProtect  order = 'p' // protect the ranges
	orderInstant  order = 'i' // from now on a page is copied before it is let go; no ranges
	orderTaken    order = 't' // the ranges are copied: let them go
	orderFlush    order = 'f' // pages that are let go are in the ring when this is answered; no ranges
	orderEnd      order = 'e' // let everything go, and end; no ranges

	// From the keeper to the worker.
	answerDone    order = 'd' // number: faults that were answered so far
	answerDropped order = 'x' // the guard is being given up; number: why, see dropReason
)

// dropReason says why a keeper gave its guard up.
type dropReason uint64

const (
	dropFull  dropReason = iota + 1 // a guest's write waited for room in the ring for as long as it may
	dropError                       // a system call failed: the errno is in the bits from 8 on
)

// rangesAtOnce is how many ranges one packet holds: all the areas of a guard, for one.
const rangesAtOnce = MaxAreas

// Range is a range of addresses in the guarded process, [Start, End), page aligned.
type Range struct{ Start, End uint64 }

// Bytes is the length of the range.
func (r Range) Bytes() uint64 { return r.End - r.Start }

const orderBytes = 1 + rangesAtOnce*int(unsafe.Sizeof(Range{}))

func sendOrder(fd int, o order, numbers ...uint64) error {
	b := make([]byte, 1, 1+8*len(numbers))
	b[0] = byte(o)
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	for {
		switch err := unix.Sendto(fd, b, unix.MSG_NOSIGNAL, nil); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return os.NewSyscallError("sendto", err)
		}
	}
}

// sendRanges sends an order for ranges, in as many packets as it takes, and returns how many those were.
func sendRanges(fd int, o order, ranges []Range) (packets int, err error) {
	for len(ranges) > 0 {
		n := min(len(ranges), rangesAtOnce)
		numbers := make([]uint64, 0, 2*n)
		for _, r := range ranges[:n] {
			numbers = append(numbers, r.Start, r.End)
		}
		if err := sendOrder(fd, o, numbers...); err != nil {
			return packets, err
		}
		ranges = ranges[n:]
		packets++
	}
	return packets, nil
}

// receiveOrder reads one packet into buf, waiting for it, and returns errClosed when the other side is gone.
func receiveOrder(fd int, buf []byte, numbers []uint64) (order, []uint64, error) {
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, nil, os.NewSyscallError("recvfrom", err)
		case n == 0:
			return 0, nil, errClosed
		case n%8 != 1:
			return 0, nil, fmt.Errorf("a control message of %d bytes", n)
		default:
			numbers = numbers[:0]
			for at := 1; at < n; at += 8 {
				numbers = append(numbers, binary.LittleEndian.Uint64(buf[at:]))
			}
			return order(buf[0]), numbers, nil
		}
	}
}
