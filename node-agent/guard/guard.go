package guard

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultWriteBound is how long a guest's write may wait for the guard unless it is said otherwise.
const DefaultWriteBound = 50 * time.Millisecond

// EndBound is how long lifting a guard of so many bytes may take: 0.2 s for 4 GiB were measured, on a slow machine.
func EndBound(bytes uint64) time.Duration {
	return 5*time.Second + time.Duration(bytes>>30)*500*time.Millisecond
}

// MaxAreas is how many areas one guard has at the most: each may split one mapping into three, and a process has a limited number of those.
const MaxAreas = 1024

// ErrDropped says that a guard was given up before all of its pages were copied. The guest goes on; what was copied since the instant counts
// for nothing.
var ErrDropped = errors.New("the guard was given up")

// CopyOnWrite says what a [Guard] guards.
type CopyOnWrite struct {
	PID int

	// Userfaultfd is a synchronous one, made inside the process and closed there again: its last holder is to be the keeper, so that the
	// guard ends with it. The guard takes it over and closes it in this process.
	Userfaultfd *os.File

	// Areas are memory of the process that is made of pages of pageset.PageBytes, transparent huge pages among them, and registered with no
	// other userfaultfd.
	Areas []Range

	// WriteBound is how long a write of the guest's may wait; zero means [DefaultWriteBound]. When it passes, the guard is given up.
	WriteBound time.Duration
}

// Guard is a keeper at work: a process that holds a synchronous userfaultfd, and has every write to a protected page wait until it has let the
// page go. Until the instant it lets go at once; from then on it copies the page into the ring first.
//
// Taken may be called by any goroutine at any time; Drain and Wait by one, and the other methods by one.
type Guard struct {
	cmd     *exec.Cmd
	control int
	memory  []byte
	ring    ring
	bell    *os.File

	answers  chan uint64   // the numbers of answerDone
	exited   chan struct{} // closed when the keeper is gone, and what follows is set
	exit     string
	dropped  uint64 // the reason that it gave, or 0
	ended    bool   // as it was told to
	bytes    uint64 // in all areas
	faults   uint64
	closeAll sync.Once
}

// Start starts the keeper and has it register the areas. Nothing is protected yet. Close must be called in the end, whatever happens.
func (o CopyOnWrite) Start(ctx context.Context) (_ *Guard, err error) {
	defer o.Userfaultfd.Close()
	if o.WriteBound == 0 {
		o.WriteBound = DefaultWriteBound
	}
	if len(o.Areas) == 0 || len(o.Areas) > MaxAreas {
		return nil, fmt.Errorf("guard %d areas: want 1 to %d", len(o.Areas), MaxAreas)
	}
	ringFD, err := unix.MemfdCreate("vmckpt-guard", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the guard's memory: %w", err)
	}
	ringFile := os.NewFile(uintptr(ringFD), "vmckpt-guard")
	defer ringFile.Close()
	if err := unix.Ftruncate(ringFD, int64(ringMemoryBytes)); err != nil {
		return nil, fmt.Errorf("make the guard's memory: %w", err)
	}
	g := &Guard{answers: make(chan uint64, 64), exited: make(chan struct{})}
	if g.memory, err = unix.Mmap(ringFD, 0, ringMemoryBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the guard's memory: %w", err)
	}
	g.ring = ringIn(g.memory)
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the guard's bell: %w", err), unix.Munmap(g.memory))
	}
	g.bell = os.NewFile(uintptr(bell), "guard bell")
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the guard's control socket: %w", err), g.bell.Close(), unix.Munmap(g.memory))
	}
	g.control = pair[0]
	theirs := os.NewFile(uintptr(pair[1]), "guard control")
	theirBell, err := unix.FcntlInt(uintptr(bell), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		bellFile := os.NewFile(uintptr(theirBell), "guard bell")
		g.cmd = exec.Command("/proc/self/exe")
		g.cmd.Args = []string{keeperName}
		g.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d,%d", keeperVariable, o.PID, o.WriteBound.Nanoseconds()), "GOMAXPROCS=1")
		g.cmd.ExtraFiles = []*os.File{theirs, o.Userfaultfd, ringFile, bellFile}
		g.cmd.Stderr = os.Stderr
		g.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // as for the leash's holder
		err = g.cmd.Start()
		bellFile.Close()
	}
	theirs.Close()
	if err != nil {
		unix.Close(g.control)
		return nil, errors.Join(fmt.Errorf("start the guard's keeper: %w", err), g.bell.Close(), unix.Munmap(g.memory))
	}
	o.Userfaultfd.Close() // now: from here on the keeper alone has it
	go g.watch()
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	for _, a := range o.Areas {
		g.bytes += a.Bytes()
	}
	if _, err := sendRanges(g.control, orderRegister, o.Areas); err != nil {
		return nil, fmt.Errorf("arm the guard: %w", err)
	}
	late := fmt.Errorf("%w: its keeper was not ready in %v", ErrDropped, armBound)
	ctx, cancel := context.WithTimeoutCause(ctx, armBound, late)
	defer cancel()
	if err := g.await(ctx, 1); err != nil {
		return nil, fmt.Errorf("arm the guard: %w", err)
	}
	return g, nil
}

// watch passes the keeper's answers on, and reaps it.
func (g *Guard) watch() {
	buf := make([]byte, 64)
	for {
		o, numbers, err := receiveOrder(g.control, buf, nil)
		if err != nil || len(numbers) != 1 {
			break
		}
		if o == answerDropped {
			g.dropped = numbers[0]
			continue
		}
		g.answers <- numbers[0]
	}
	if err := g.cmd.Wait(); err != nil {
		g.exit = err.Error()
	} else {
		g.exit = "ended"
	}
	close(g.answers)
	close(g.exited)
	g.StopWaiting()
}

// PID is the process id of the keeper.
func (g *Guard) PID() int { return g.cmd.Process.Pid }

// Gone is closed when the keeper has ended.
func (g *Guard) Gone() <-chan struct{} { return g.exited }

// Faults is how many writes of the guest's have waited, as of the last answer.
func (g *Guard) Faults() uint64 { return g.faults }

// why is the error of a keeper that is gone.
func (g *Guard) why() error {
	switch {
	case g.dropped == uint64(dropFull):
		return fmt.Errorf("%w: a write of the guest's waited too long, for its pages could not be stored as fast as they came", ErrDropped)
	case g.dropped>>8 != 0:
		return fmt.Errorf("%w: its keeper failed: %w", ErrDropped, unix.Errno(g.dropped>>8))
	}
	return fmt.Errorf("%w: its keeper %s", ErrDropped, g.exit)
}

// await waits for n answers.
func (g *Guard) await(ctx context.Context, n int) error {
	for range n {
		select {
		case faults, ok := <-g.answers:
			if !ok {
				return g.why()
			}
			g.faults = faults
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// ask sends an order without ranges and waits for its answer.
func (g *Guard) ask(ctx context.Context, o order) error {
	if err := sendOrder(g.control, o); err != nil {
		return g.lost(err)
	}
	return g.await(ctx, 1)
}

// lost is the error of an order that could not be sent: the keeper is gone, or about to be.
func (g *Guard) lost(err error) error {
	select {
	case <-g.exited:
		return g.why()
	case <-time.After(armBound):
		return fmt.Errorf("%w: %w", ErrDropped, err)
	}
}

// Protect protects ranges, and has waited for it when it returns: writes to them wait for the keeper from then on.
func (g *Guard) Protect(ctx context.Context, ranges []Range) error {
	// What is under way is bounded, so that neither side waits for the other to read.
	for len(ranges) > 0 {
		n := min(len(ranges), 16*rangesAtOnce)
		packets, err := sendRanges(g.control, orderProtect, ranges[:n])
		if err != nil {
			return g.lost(err)
		}
		if err := g.await(ctx, packets); err != nil {
			return err
		}
		ranges = ranges[n:]
	}
	return nil
}

// Instant says that the guarded memory is what is wanted from now on: a page is copied into the ring before it is let go. It is called, and
// returns, while nothing writes.
func (g *Guard) Instant(ctx context.Context) error { return g.ask(ctx, orderInstant) }

// Taken says that ranges are copied: writes to them need not wait any more. It does not wait for the keeper to let them go.
func (g *Guard) Taken(ranges []Range) error {
	if _, err := sendRanges(g.control, orderTaken, ranges); err != nil {
		return g.lost(err)
	}
	return nil
}

// Flush returns when the page of every write that was let go is in the ring.
func (g *Guard) Flush(ctx context.Context) error { return g.ask(ctx, orderFlush) }

// Wait waits until there may be pages in the ring. [ErrDropped] says that the keeper is gone, or that waiting was stopped.
func (g *Guard) Wait() error {
	var b [8]byte
	_, err := g.bell.Read(b[:])
	if err == nil {
		return nil
	}
	select {
	case <-g.exited:
		return g.why()
	default:
		return fmt.Errorf("%w: %w", ErrDropped, err)
	}
}

// StopWaiting makes Wait return at once, from now on.
func (g *Guard) StopWaiting() { g.bell.SetReadDeadline(time.Unix(1, 0)) } //nolint:errcheck // it has deadlines

// Page is one that was written since the instant, with what it held then.
type Page struct {
	Address uint64
	Content []byte
}

// Filled is how many pages are in the ring.
func (g *Guard) Filled() int { return int(g.ring.filled()) }

// Drain takes up to n pages out of the ring, those that have waited longest, and gives them to take. They are valid during the call alone. It
// returns how many there were.
func (g *Guard) Drain(n int, take func([]Page) error) (int, error) {
	n = min(n, g.Filled())
	if n == 0 {
		return 0, nil
	}
	pages := make([]Page, n)
	for i := range pages {
		pages[i].Address, pages[i].Content = g.ring.look(i)
	}
	if err := take(pages); err != nil {
		return 0, err
	}
	g.ring.drop(n)
	return n, nil
}

// End lets everything go and ends the keeper.
func (g *Guard) End(ctx context.Context) error {
	if g.ended {
		return nil
	}
	if err := g.ask(ctx, orderEnd); err != nil {
		return fmt.Errorf("lift the guard: %w", err)
	}
	g.ended = true
	return nil
}

// Kill ends the keeper at once. The kernel lifts the guard, in one go, which the guest's page faults wait for. It may be called at any time by
// any goroutine.
func (g *Guard) Kill() { g.cmd.Process.Kill() } //nolint:errcheck // it is gone, or going

// Close ends the keeper, if it is still there, and frees what the guard has here.
func (g *Guard) Close() {
	g.closeAll.Do(func() {
		// Nobody to obey is the end for it as well, and it lifts the guard in steps.
		unix.Shutdown(g.control, unix.SHUT_WR) //nolint:errcheck // it is gone then
		late := time.AfterFunc(EndBound(g.bytes), g.Kill)
		defer late.Stop()
		for range g.answers {
		}
		<-g.exited
		unix.Close(g.control)
		g.bell.Close()
		unix.Munmap(g.memory) //nolint:errcheck // our own mapping
	})
}
