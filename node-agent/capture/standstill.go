package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

const (
	// answerBound is how long QEMU may take to answer once it has been let go, before the checkpoint gives up waiting. It is
	// let go by then, whatever it does.
	answerBound = 30 * time.Second

	// letGoBound is how long reading a stream to its end may take, and QEMU's answer after it. Nothing stands for that long but by a fault.
	letGoBound = 2 * time.Second

	// watchSlack is what the worker leaves the kernel's timer before it kills the holder itself.
	watchSlack = 50 * time.Millisecond

	// wakeBound is how long it may take to find out whether QEMU started the machine again, and to do so.
	wakeBound = 10 * time.Second

	// eventWait is how long the events of a pause may be behind the answer of its command; libvirt passes them on by another way.
	eventWait = 250 * time.Millisecond
)

// standstill is one time that the machine stands still on a leash. It is a dirty.Standstill.
type standstill struct {
	leash   *guard.Leash
	bound   atomic.Int64  // ns: how long the hold may be
	watch   *time.Timer   // kills the holder; runs from QEMU's STOP on
	limit   time.Duration // bound, as long as the machine is held
	since   time.Time     // from when limit counts; zero is the first byte
	ended   atomic.Bool
	parts   []Phase
	partEnd time.Time
}

// errEnded is what a standstill says once it was let go.
var errEnded = errors.New("the machine does not stand still any more")

// Err tells whether the machine still is held.
func (s *standstill) Err() error {
	if s.ended.Load() {
		return errEnded
	}
	select {
	case <-s.leash.Gone():
		return fmt.Errorf("%w: %w", errEnded, guard.ErrLetGo)
	default:
		return nil
	}
}

// extend gives the hold another bound, from now on.
func (s *standstill) extend(bound time.Duration) error {
	s.limit, s.since = bound, time.Now()
	// First the bound: the event that starts the watch may come only now.
	s.bound.Store(int64(bound))
	s.watch.Reset(bound + watchSlack)
	return s.leash.Extend(bound)
}

// why says of an error in the hold that it came of its bound, where it did: the holder is killed then, which says nothing to anybody.
func (s *standstill) why(err error) error {
	since := s.since
	if since.IsZero() {
		since = s.leash.FirstByte()
	}
	if !errors.Is(err, guard.ErrLetGo) || since.IsZero() || time.Since(since) < s.limit {
		return err
	}
	return &BoundError{s.limit}
}

// part ends a named part of the pause here.
func (s *standstill) part(name string) {
	now := time.Now()
	s.parts = append(s.parts, Phase{name, now.Sub(s.partEnd)})
	s.partEnd = now
}

// standStill makes the machine stand still once, calls held while it is held, and returns the device state of that moment. Where
// streamBytes is 0 the machine is not held, only drained: held is not called.
//
// The machine runs again when it returns, if it ran before, whatever the error: but for a QEMU that does not answer any more, which the
// error then says. A pause that did not hold is reported as lost.
func (c *capture) standStill(ctx context.Context, what string, streamBytes uint64, held func(context.Context, *standstill) error) (_ []byte, err error) {
	pause := Pause{For: what, Lost: true}
	defer func() {
		pause.Lost = err != nil
		c.result.Pauses = append(c.result.Pauses, pause)
		if c.running { // else the guest stood still anyway
			c.result.Downtime += pause.Total
		}
	}()

	// As late as can be: a migration that began since the last look might stop the machine itself while QEMU stops it for us, which ends in
	// an assertion of QEMU's; and a guest that went to sleep would be stopped, and not started again. One that begins now does not come so
	// far within the milliseconds that are left.
	if err := c.checkState(ctx); err != nil {
		return nil, err
	}
	pipe, err := openReadEnd(c.target.Process, c.pipe)
	if err != nil {
		return nil, err
	}
	leash, err := guard.Start(ctx, guard.Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: c.o.HoldBound})
	if err != nil {
		return nil, err
	}
	defer leash.Close()
	s := &standstill{leash: leash, limit: c.o.HoldBound}
	s.bound.Store(int64(c.o.HoldBound))
	if streamBytes == 0 {
		s.bound.Store(int64(max(c.o.HoldBound, letGoBound)))
	}
	s.watch = time.AfterFunc(time.Hour, leash.Kill)
	defer s.watch.Stop()
	c.o.step(StepArmed)

	events := c.target.Monitor.Subscribe("STOP", "RESUME")
	defer events.Close()
	stopped, resumed := make(chan time.Time, 1), make(chan time.Time, 1)
	var stops, resumes atomic.Int32
	go func() {
		for e := range events.C {
			switch e.Name {
			case "STOP":
				if stops.Add(1) == 1 {
					s.watch.Reset(time.Duration(s.bound.Load()) + watchSlack)
					stopped <- e.Time
				}
			case "RESUME":
				if resumes.Add(1) == 1 {
					resumed <- e.Time
				}
			}
		}
	}()

	// The command goes on whatever happens to ctx: only the leash's end ends it.
	answered := make(chan struct{})
	var refused error
	sent := time.Now()
	go func() {
		defer close(answered)
		refused = qemu.SaveDeviceState(context.WithoutCancel(ctx), c.target.Monitor, fmt.Sprintf("/proc/self/fd/%d", c.pipe.FD))
	}()
	c.o.step(StepSent)

	err = func() error {
		if streamBytes == 0 {
			select {
			case <-answered:
			case <-leash.Gone():
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			return nil
		}
		if err := leash.Held(ctx, answered); err != nil {
			return err
		}
		s.partEnd = leash.FirstByte()
		s.part("serialise")
		c.o.step(StepHeld)
		// Nothing in the hold waits for longer than the hold lasts.
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		go func() {
			select {
			case <-leash.Gone():
				cancel(guard.ErrLetGo)
			case <-ctx.Done():
			}
		}()
		if err := held(ctx, s); err != nil {
			if gone := s.Err(); gone != nil && !errors.Is(err, errEnded) {
				return fmt.Errorf("%w: %w", gone, err) // whatever it was, it was because of that
			}
			return err
		}
		s.bound.Store(int64(letGoBound))
		s.watch.Reset(letGoBound + watchSlack)
		return leash.Release()
	}()
	err = s.why(err)
	s.ended.Store(true)
	// Whatever failed, QEMU is to come to the end of its command: one whose reader is gone leaves the pipe open in QEMU for good. The watch
	// sees to it that this does not take long.
	if err != nil {
		s.bound.Store(int64(letGoBound))
		s.watch.Reset(letGoBound + watchSlack)
		if leash.Release() != nil {
			leash.Kill()
		}
	}
	released := time.Now()
	s.partEnd = released

	select {
	case <-answered:
	case <-time.After(answerBound):
		leash.Kill()
		c.unanswered = true
		return nil, errors.Join(err, fmt.Errorf("%w: xen-save-devices-state of %v, %v after its stream was let go", errNoAnswer, c.target.Process, answerBound))
	}
	s.part("let go")
	if streamBytes != 0 && err == nil {
		c.o.step(StepReleased)
	}
	var stream []byte
	if err == nil && refused == nil {
		stream, err = leash.Finish(ctx)
	}
	s.watch.Stop()

	// How long the machine stood: by QEMU's own stamps where there are both, else from the first byte (or the sending) to the answer.
	began := leash.FirstByte()
	if began.IsZero() {
		began = sent
	}
	pause.Total, pause.Parts = time.Since(began), s.parts
	if c.running {
		if from, ok := soon(stopped); ok {
			if to, ok := soon(resumed); ok {
				pause.Total, pause.Exact = to.Sub(from), true
			}
			if !leash.FirstByte().IsZero() {
				// What was seen from here may be a little late.
				stop := max(0, leash.FirstByte().Sub(from))
				if pause.Exact {
					stop = min(stop, pause.Total)
				}
				pause.Parts = append([]Phase{{"stop", stop}}, pause.Parts...)
			}
			if pause.Exact {
				pause.balance()
			}
			if streamBytes != 0 {
				c.result.Instant = from
			}
		}
	}
	if c.running && stops.Load() > 0 && resumes.Load() == 0 {
		if woken := c.wake(); woken != nil {
			return nil, errors.Join(err, refused, woken)
		}
	}
	switch {
	case refused != nil && err != nil:
		// QEMU's refusal says only that its stream broke off; why it did is ours to say.
		return nil, err
	case refused != nil:
		return nil, refused
	case err != nil:
		return nil, err
	}
	// One stop and one start, both QEMU's own: anything else is somebody else's doing, and the stamps and states of this pause are not
	// what they seem. (A machine that its owner paused has neither.)
	want := int32(0)
	if c.running {
		want = 1
	}
	if got, again := stops.Load(), resumes.Load(); got > want || again > want {
		return nil, fmt.Errorf("%w: QEMU stopped the machine %d times and started it %d times", errDisturbed, got, again)
	}
	return stream, nil
}

// wake starts a machine again that QEMU stopped for our command and did not start. QEMU from 9.0 on stops a guest that sleeps (ACPI S3) as
// well, and starts only those that ran; it goes to sleep between our look and our command. Nobody else brings it back: it cannot be woken
// by the guest's own means, nor by system_wakeup. It sleeps on then.
func (c *capture) wake() error {
	ctx, cancel := context.WithTimeout(context.Background(), wakeBound) // whatever became of the checkpoint's own
	defer cancel()
	state, err := qemu.Status(ctx, c.target.Monitor)
	if err != nil {
		return fmt.Errorf("see whether QEMU started the machine again: %w", err)
	}
	if state != qemu.StateSaveVM {
		return nil
	}
	migration, err := qemu.Migration(ctx, c.target.Monitor)
	if err != nil {
		return fmt.Errorf("see whether QEMU started the machine again: %w", err)
	}
	if !migration.Status.Idle() {
		return fmt.Errorf("the machine was left %q, and not started as a migration is %q", string(state), string(migration.Status))
	}
	if err := c.target.Monitor.Execute(ctx, "cont", nil, nil); err != nil {
		return fmt.Errorf("start the machine, which QEMU left %q: %w", string(state), err)
	}
	return fmt.Errorf("%w: the guest went to sleep as it was stopped", errDisturbed)
}

// soon waits a little for a value.
func soon(c <-chan time.Time) (time.Time, bool) {
	select {
	case t := <-c:
		return t, true
	case <-time.After(eventWait):
		return time.Time{}, false
	}
}

// openReadEnd opens the pipe whose write end is in the process, for reading. It is the one reader: QEMU gets EPIPE when it is gone.
func openReadEnd(p *qemu.Process, pipe inject.RemoteFile) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("open the leash's pipe, descriptor %d of %v: %w", pipe.FD, p, err)
	}
	// As a path first: what a hostile process has put there may be a device, which is not to be opened.
	path, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%d", p.PID, pipe.FD), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(path)
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return fail(err)
	}
	if uint64(st.Dev) != pipe.Device || st.Ino != pipe.Inode || st.Mode&unix.S_IFMT != unix.S_IFIFO || !p.Alive() {
		return fail(inject.ErrIdentity)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", path), os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	return f, nil
}
