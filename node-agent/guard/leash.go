package guard

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultHoldBound is how long a machine is held at the most unless it is said otherwise.
const DefaultHoldBound = 200 * time.Millisecond

// armBound is how long a holder may take until it is ready: its process is started, and memory locked for it.
const armBound = 5 * time.Second

// ErrLetGo says that the leash was let go without the worker's word: the holder died, was killed at the bound of the hold, or
// failed. The machine runs again if it ran before, and nothing read during the hold counts.
var ErrLetGo = errors.New("the leash was let go")

// ErrNotHeld says that the stream ended before the point at which the machine was to be held: it was shorter than it was known to
// be, so the machine's devices have changed. Nothing was held.
var ErrNotHeld = errors.New("the device state ended before the machine was held")

// Options says how a leash holds.
type Options struct {
	// Pipe is the read end of the pipe whose write end QEMU writes the device state to. The leash takes it over and closes
	// it in this process: when the holder dies, QEMU must find no reader.
	Pipe *os.File

	// StreamBytes is the length the device state is known to have. Zero reads the stream through without holding.
	StreamBytes uint64

	// HoldBound is how long the machine stands at the most, from the first byte of the stream on; zero means
	// [DefaultHoldBound]. The holder is killed when it passes.
	HoldBound time.Duration
}

// Leash is a holder at work. Its methods but Kill are for one goroutine.
type Leash struct {
	cmd     *exec.Cmd
	control int
	stream  []byte // shared with the holder
	holdAt  uint64 // 0: not to be held

	pipeBytes uint64 // capacity of the pipe

	events chan event    // from the holder; closed when it is gone
	exited chan struct{} // closed when the holder is gone, and exit is set
	exit   string        // how it ended

	first    time.Time
	failure  unix.Errno
	closeAll sync.Once
}

// event is a message of the holder's and when it came.
type event struct {
	message
	at time.Time
}

// Start starts a holder and waits until it is armed: the next stream that QEMU writes into the pipe is held. Close must be called in
// the end, whatever happens.
func Start(ctx context.Context, o Options) (_ *Leash, err error) {
	defer o.Pipe.Close()
	if o.HoldBound == 0 {
		o.HoldBound = DefaultHoldBound
	}
	l := &Leash{events: make(chan event, 8), exited: make(chan struct{})}
	l.pipeBytes = pipeBytesAll
	if o.StreamBytes != 0 {
		l.pipeBytes = pipeBytesLong
		if o.StreamBytes < shortStream {
			l.pipeBytes = pipeBytesShort
		}
	}
	if err := unix.SetNonblock(int(o.Pipe.Fd()), true); err != nil {
		return nil, fmt.Errorf("make the leash's pipe non-blocking: %w", err)
	}
	if err := drain(int(o.Pipe.Fd())); err != nil {
		return nil, err
	}
	capacity, err := unix.FcntlInt(o.Pipe.Fd(), unix.F_SETPIPE_SZ, int(l.pipeBytes))
	if err != nil {
		return nil, fmt.Errorf("set the leash's pipe to %d bytes: %w", l.pipeBytes, err)
	}
	l.pipeBytes = uint64(capacity) // a page at the least, and those may be large
	if o.StreamBytes != 0 {
		if o.StreamBytes <= restPipes*l.pipeBytes {
			return nil, fmt.Errorf("hold a device state of %d bytes: too short to be held by a pipe of %d", o.StreamBytes, l.pipeBytes)
		}
		l.holdAt = o.StreamBytes - restPipes*l.pipeBytes
	}
	memory, err := unix.MemfdCreate("vmckpt-device-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory for the device state: %w", err)
	}
	memoryFile := os.NewFile(uintptr(memory), "vmckpt-device-state")
	defer memoryFile.Close()
	if err := unix.Ftruncate(memory, streamBound); err != nil {
		return nil, fmt.Errorf("make memory for the device state: %w", err)
	}
	l.stream, err = unix.Mmap(memory, 0, streamBound, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memory for the device state: %w", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the leash's control socket: %w", err), unix.Munmap(l.stream))
	}
	l.control = pair[0]
	theirs := os.NewFile(uintptr(pair[1]), "leash control")

	l.cmd = exec.Command("/proc/self/exe")
	l.cmd.Args = []string{holderName}
	l.cmd.Env = append(os.Environ(), holderVariable+"="+strconv.FormatUint(l.holdAt, 10), "GOMAXPROCS=1")
	l.cmd.ExtraFiles = []*os.File{theirs, o.Pipe, memoryFile}
	l.cmd.Stderr = os.Stderr
	// A signal meant for the worker's process group must not let go a machine in the middle of its instant.
	l.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	err = l.cmd.Start()
	theirs.Close()
	if err != nil {
		unix.Close(l.control)
		return nil, errors.Join(fmt.Errorf("start the leash's holder: %w", err), unix.Munmap(l.stream))
	}
	o.Pipe.Close() // now: from here the holder alone is the reader
	go l.watch()

	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err := send(l.control, message{kindExtend, uint64(o.HoldBound)}); err != nil {
		return nil, fmt.Errorf("arm the leash: %w", err)
	}
	// No timer of the kernel's watches the holder yet. Nobody stands still for it, but the checkpoint would wait for ever.
	late := fmt.Errorf("%w: its holder was not ready in %v", ErrLetGo, armBound)
	ctx, cancel := context.WithTimeoutCause(ctx, armBound, late)
	defer cancel()
	if _, err := l.await(ctx, kindArmed); err != nil {
		return nil, fmt.Errorf("arm the leash: %w", err)
	}
	return l, nil
}

// drain throws away what an earlier stream, cut short, has left in the pipe.
func drain(pipe int) error {
	buf := make([]byte, pipeBytesLong)
	for {
		n, err := unix.Read(pipe, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return nil
		case err != nil:
			return fmt.Errorf("empty the leash's pipe: %w", err)
		case n == 0:
			return fmt.Errorf("empty the leash's pipe: it has no writer: %w", unix.EPIPE)
		}
	}
}

// watch passes the holder's messages on, and reaps it.
func (l *Leash) watch() {
	for {
		m, err := receive(l.control)
		if err != nil {
			break
		}
		l.events <- event{m, time.Now()}
	}
	if err := l.cmd.Wait(); err != nil {
		l.exit = err.Error()
	} else {
		l.exit = "ended"
	}
	close(l.events)
	close(l.exited)
}

// PID is the process id of the holder.
func (l *Leash) PID() int { return l.cmd.Process.Pid }

// Gone is closed when the holder has ended: by itself, by its bound or by Kill.
func (l *Leash) Gone() <-chan struct{} { return l.exited }

// await waits for a message of the wanted kind; only what comes before it in the protocol may come earlier.
func (l *Leash) await(ctx context.Context, want kind) (message, error) {
	for {
		select {
		case m, ok := <-l.events:
			switch {
			case !ok && l.failure != 0:
				return message{}, fmt.Errorf("%w: its holder failed: %w", ErrLetGo, l.failure)
			case !ok:
				return message{}, fmt.Errorf("%w: its holder ended (%s)", ErrLetGo, l.exit)
			case m.kind == want:
				return m.message, nil
			case m.kind == kindFirst:
				l.first = m.at
			case m.kind == kindHeld:
			case m.kind == kindError:
				l.failure = unix.Errno(m.number)
			default:
				return message{}, fmt.Errorf("the leash's holder sent %v in place of %q", m.message, rune(want))
			}
		case <-ctx.Done():
			return message{}, context.Cause(ctx)
		}
	}
}

// Held waits until the machine is held. The command that writes the stream must have been sent to QEMU; answered is closed when
// QEMU has answered it, which before the hold means that there will be none: [ErrNotHeld].
func (l *Leash) Held(ctx context.Context, answered <-chan struct{}) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-answered:
			cancel(ErrNotHeld)
		case <-stop:
		}
	}()
	_, err := l.await(ctx, kindHeld)
	return err
}

// FirstByte is when the first byte of the stream was seen, the zero time before that.
func (l *Leash) FirstByte() time.Time { return l.first }

// Extend gives the hold a new bound, from now on.
func (l *Leash) Extend(bound time.Duration) error {
	if err := send(l.control, message{kindExtend, uint64(bound)}); err != nil {
		return fmt.Errorf("%w: extend the hold: %w", ErrLetGo, err)
	}
	return nil
}

// Release lets the machine go: the holder reads the stream to its end. An error means that the leash had been let go before.
func (l *Leash) Release() error {
	if err := send(l.control, message{kind: kindRelease}); err != nil {
		return fmt.Errorf("%w: release the machine: %w", ErrLetGo, err)
	}
	return nil
}

// Finish returns the whole stream, after QEMU has answered the command that wrote it. Where the machine was to be held it also
// proves that it was: so much of the stream must have come after the hold that QEMU cannot have been done writing before.
func (l *Leash) Finish(ctx context.Context) ([]byte, error) {
	if err := send(l.control, message{kind: kindFinish}); err != nil {
		return nil, fmt.Errorf("%w: finish the device state: %w", ErrLetGo, err)
	}
	m, err := l.await(ctx, kindDone)
	if err != nil {
		return nil, fmt.Errorf("finish the device state: %w", err)
	}
	if m.number > streamBound {
		return nil, fmt.Errorf("the leash's holder reports a device state of %d bytes", m.number)
	}
	if l.holdAt != 0 && m.number <= l.holdAt+l.pipeBytes {
		return nil, fmt.Errorf("%w: %d bytes in all, held at %d", ErrNotHeld, m.number, l.holdAt)
	}
	return append([]byte(nil), l.stream[:m.number]...), nil
}

// Kill ends the holder at once: QEMU fails the command and lets the machine run if it ran before. It may be called at any time
// by any goroutine.
func (l *Leash) Kill() { l.cmd.Process.Kill() } //nolint:errcheck // it is gone, or going

// Close ends the holder, if it is still there, and frees what the leash has here.
func (l *Leash) Close() {
	l.closeAll.Do(func() {
		l.Kill()
		for range l.events { // until the watcher has seen the end
		}
		<-l.exited
		unix.Close(l.control)
		unix.Munmap(l.stream) //nolint:errcheck // our own mapping
	})
}
