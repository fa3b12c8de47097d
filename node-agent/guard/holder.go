package guard

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/inject"
)

// holderVariable marks a process as the holder of a leash; its value is the length of the stream to hold at, see [Main].
const holderVariable = "VMCKPT_LEASH_HOLD_AT_BYTES"

// holderName is its whole command line, for people who look at processes.
const holderName = "vmckpt-leash"

// Descriptors that the worker leaves to the holder.
const (
	holderControlFD = 3 // SOCK_SEQPACKET, see protocol.go
	holderPipeFD    = 4 // the leash: the read end of the pipe, non-blocking
	holderStreamFD  = 5 // shared memory of streamBound bytes, which the stream is written to
)

const (
	// streamBound is the longest device state that is taken, in bytes. It is 170–320 KB for the machines measured; the
	// bound keeps what QEMU sends, which a hostile guest may have a hand in, from filling the memory.
	streamBound = 16 << 20

	// streamLocked is how much memory for the stream is taken beforehand, in bytes, beyond where it is held.
	streamLocked = 512 << 10

	// restPipes is how many pipes' worth of the stream are left unread while the machine is held. It must be more than the pipe
	// holds, or QEMU would be done writing and start the machine.
	restPipes = 2

	// The capacities that the pipe is set to. QEMU and the holder take turns for each filling of it, so that a small pipe makes
	// serialising slow; but what is in the pipe and what is left unread has to be little against the stream.
	pipeBytesShort = 4 << 10  // for a stream of less than shortStream
	pipeBytesLong  = 16 << 10 // for others
	pipeBytesAll   = 1 << 20  // for one that is read through: QEMU need not wait for the reader at all
	shortStream    = 128 << 10

	// releaseBound is how long the holder may take to read on, once it was released, and to be told that QEMU has answered. The machine
	// waits for the reading alone, which takes milliseconds.
	releaseBound = 2 * time.Second

	// startBound is how long the holder waits for the first byte before it gives up: QEMU stops the vCPUs, drains and
	// flushes disks before it writes.
	startBound = 2 * time.Second
)

// Main plays the part of a leash's holder or a guard's keeper if this process was started as one, and does not return then. It must be called
// first in main, and in TestMain of whatever uses them.
func Main() {
	if value, ok := os.LookupEnv(keeperVariable); ok {
		if err := keep(value); err != nil && !errors.Is(err, errClosed) {
			fmt.Fprintln(os.Stderr, "vmckpt: guard:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	value, ok := os.LookupEnv(holderVariable)
	if !ok {
		return
	}
	holdAt, err := strconv.ParseUint(value, 10, 64)
	if err == nil {
		err = hold(holdAt)
	}
	if err == nil || errors.Is(err, errClosed) {
		os.Exit(0)
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		errno = unix.EPROTO
	}
	send(holderControlFD, message{kindError, uint64(errno)}) //nolint:errcheck // the worker may be gone; it is the end in any case
	fmt.Fprintln(os.Stderr, "vmckpt: leash:", err)
	os.Exit(1)
}

// hold reads the stream and, where holdAt is not zero, stops reading once holdAt bytes have come, until it is released.
// The bound of the hold comes with an extend message before anything is armed.
func hold(holdAt uint64) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1) // it lives for a second and allocates next to nothing
	// While it waits for a processor the guest stands still. Where it may not go first in line, it does as well as it can.
	unix.Setpriority(unix.PRIO_PROCESS, 0, -20) //nolint:errcheck // see above
	first, err := receive(holderControlFD)
	if err != nil {
		return err
	}
	if first.kind != kindExtend {
		return fmt.Errorf("the worker began with %v", first)
	}
	holdBound := time.Duration(first.number)

	if err := lockMemory(); err != nil {
		return err
	}
	stream, err := unix.Mmap(holderStreamFD, 0, streamBound, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the stream's memory: %w", err)
	}
	// What the stream will take is there beforehand. Should it be longer, the kernel's zero pages are all that it waits for.
	if err := unix.Mlock(stream[:min(streamBound, holdAt+streamLocked)]); err != nil {
		return fmt.Errorf("lock the stream's memory: %w", err)
	}
	timer, err := inject.NewKillTimer()
	if err != nil {
		return err
	}
	// From here on the kernel ends us, whatever becomes of us.
	if err := timer.Set(startBound + holdBound); err != nil {
		return err
	}
	if err := send(holderControlFD, message{kind: kindArmed}); err != nil {
		return err
	}

	var (
		read     uint64
		released = holdAt == 0
		held     bool
	)
	for {
		fds := []unix.PollFd{
			{Fd: holderControlFD, Events: unix.POLLIN},
			{Fd: holderPipeFD, Events: unix.POLLIN},
		}
		if held && !released {
			fds = fds[:1]
		}
		if _, err := unix.Poll(fds, -1); err != nil {
			if err == unix.EINTR {
				continue
			}
			return fmt.Errorf("wait for the stream: %w", err)
		}
		if len(fds) == 2 && fds[1].Revents != 0 {
			end := uint64(len(stream))
			if !released {
				end = holdAt
			}
			n, err := readPipe(stream[read:end])
			if err != nil {
				return err
			}
			if n == 0 && fds[1].Revents&unix.POLLIN == 0 {
				// QEMU closed the last write end, the one that it keeps included: it died.
				return fmt.Errorf("read the device state: the pipe's writer is gone after %d bytes: %w", read, unix.EPIPE)
			}
			if read == 0 && n > 0 {
				// The machine stands from now on: the bound counts from here.
				if released { // it is only read through
					holdBound = max(holdBound, releaseBound)
				}
				if err := timer.Set(holdBound); err != nil {
					return err
				}
				if err := send(holderControlFD, message{kind: kindFirst}); err != nil {
					return err
				}
			}
			read += n
			if !released && read == holdAt {
				held = true
				if err := send(holderControlFD, message{kindHeld, read}); err != nil {
					return err
				}
			}
			if read == uint64(len(stream)) {
				return fmt.Errorf("read the device state: longer than %d bytes: %w", len(stream), unix.EFBIG)
			}
		}
		if fds[0].Revents == 0 {
			continue
		}
		m, err := receive(holderControlFD)
		if err != nil {
			return err
		}
		switch m.kind {
		case kindRelease:
			released = true
			if err := timer.Set(releaseBound); err != nil {
				return err
			}
		case kindExtend:
			if err := timer.Set(time.Duration(m.number)); err != nil {
				return err
			}
		case kindFinish:
			for {
				n, err := readPipe(stream[read:])
				if err != nil {
					return err
				}
				if n == 0 {
					break
				}
				read += n
			}
			return send(holderControlFD, message{kindDone, read})
		default:
			return fmt.Errorf("the worker sent %v", m)
		}
	}
}

// readPipe reads what is in the pipe, up to len(p) bytes, without waiting: 0 means that there is nothing now.
func readPipe(p []byte) (uint64, error) {
	for {
		n, err := unix.Read(holderPipeFD, p)
		switch err {
		case nil:
			return uint64(n), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, nil
		default:
			return 0, fmt.Errorf("read the device state: %w", err)
		}
	}
}
