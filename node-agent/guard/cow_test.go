package guard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// memory is guarded memory of this process, and threads that write to it as a guest does.
type memory struct {
	t     *testing.T
	bytes []byte
	start uint64

	world  sync.RWMutex // held for reading by each write
	end    chan struct{}
	ended  sync.WaitGroup
	writes atomic.Uint64
	worst  atomic.Int64 // ns: the longest write
}

// pages is how many the memory has: more than the ring.
const pages = ringSlots + 512

func newMemory(t *testing.T, flags int) *memory {
	t.Helper()
	b, err := unix.Mmap(-1, 0, pages*pageset.PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|flags)
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{t: t, bytes: b, start: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), end: make(chan struct{})}
	t.Cleanup(func() {
		close(m.end)
		m.ended.Wait()
		unix.Munmap(b) //nolint:errcheck // it was mapped
	})
	for page := range pages {
		binary.LittleEndian.PutUint64(b[page*pageset.PageBytes:], rand.Uint64())
	}
	return m
}

// write has n threads write to random pages until the test's end, each after a pause.
func (m *memory) write(n int, pause time.Duration) {
	for range n {
		m.ended.Go(func() {
			for {
				select {
				case <-m.end:
					return
				case <-time.After(pause):
				}
				page := rand.IntN(pages)
				m.world.RLock()
				begin := time.Now()
				binary.LittleEndian.PutUint64(m.bytes[page*pageset.PageBytes+8*rand.IntN(512):], rand.Uint64())
				took := time.Since(begin)
				m.world.RUnlock()
				m.writes.Add(1)
				for old := m.worst.Load(); int64(took) > old && !m.worst.CompareAndSwap(old, int64(took)); old = m.worst.Load() {
				}
			}
		})
	}
}

func (m *memory) all() Range { return Range{m.start, m.start + uint64(len(m.bytes))} }

// guard starts a guard of all the memory.
func (m *memory) guard(bound time.Duration) *Guard {
	m.t.Helper()
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		m.t.Fatalf("userfaultfd: %v", errno)
	}
	uffd := pagetable.Userfaultfd{File: os.NewFile(fd, "userfaultfd")}
	if _, err := uffd.API(pagetable.FeaturesGuard); err != nil {
		m.t.Fatal(err)
	}
	g, err := CopyOnWrite{PID: os.Getpid(), Userfaultfd: uffd.File, Areas: []Range{m.all()}, WriteBound: bound}.Start(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(g.Close)
	return g
}

// instant stops the writers, has the guard keep what there is now, and returns that.
func (m *memory) instant(g *Guard) []byte {
	m.t.Helper()
	m.world.Lock()
	defer m.world.Unlock()
	if err := errors.Join(g.Protect(m.t.Context(), []Range{m.all()}), g.Instant(m.t.Context())); err != nil {
		m.t.Fatal(err)
	}
	return bytes.Clone(m.bytes)
}

// collect takes pages out of the ring until it is empty.
func (m *memory) collect(g *Guard, into map[uint64][]byte) {
	m.t.Helper()
	for {
		n, err := g.Drain(64, func(pages []Page) error {
			for _, p := range pages {
				page := (p.Address - m.start) / pageset.PageBytes
				if into[page] != nil {
					return fmt.Errorf("page %d came twice", page)
				}
				into[page] = bytes.Clone(p.Content)
			}
			return nil
		})
		if err != nil {
			m.t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
}

// protected are the pages that the guard has not let go.
func (m *memory) protected() *pageset.Set {
	m.t.Helper()
	pagemap, err := pagetable.OpenPagemap(os.Getpid())
	if err != nil {
		m.t.Fatal(err)
	}
	defer pagemap.Close()
	set := pageset.New(pages)
	if err := pagemap.Entries(m.all().Start, m.all().End, func(at uint64, entries []pagetable.Entry) error {
		for i, e := range entries {
			if e.WriteProtected() && e.Present() {
				set.Add(pageset.Run{First: (at-m.start)/pageset.PageBytes + uint64(i), Count: 1})
			}
		}
		return nil
	}); err != nil {
		m.t.Fatal(err)
	}
	return set
}

// goesOn wants the writers to write on.
func (m *memory) goesOn() {
	m.t.Helper()
	before := m.writes.Load()
	for deadline := time.Now().Add(20 * time.Second); m.writes.Load() < before+100; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("the writers hang: a guest would stand still for ever")
		}
	}
}

// TestCopyOnWrite has every page come either out of the ring or, protected still, be what it was.
func TestCopyOnWrite(t *testing.T) {
	for name, flags := range map[string]int{"private": unix.MAP_PRIVATE, "shared": unix.MAP_SHARED} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t, flags)
			m.write(4, 20*time.Microsecond)
			g := m.guard(10 * time.Second)
			if err := g.Protect(t.Context(), []Range{m.all()}); err != nil {
				t.Fatal(err)
			}
			m.goesOn() // before the instant pages are let go and nothing is kept
			want := m.instant(g)
			caught := map[uint64][]byte{}
			for len(caught) < 500 {
				if err := g.Wait(); err != nil {
					t.Fatal(err)
				}
				m.collect(g, caught)
			}
			// Those that are protected are as they were: read first, and looked at after.
			got := make([]byte, len(m.bytes))
			memory, err := pagetable.OpenMemory(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			defer memory.Close()
			if err := memory.Read(got, m.start); err != nil {
				t.Fatal(err)
			}
			still := m.protected()
			if err := errors.Join(g.Taken([]Range{m.all()}), g.Flush(t.Context())); err != nil {
				t.Fatal(err)
			}
			m.collect(g, caught)
			both := 0
			for page := range uint64(pages) {
				content := caught[page]
				if still.Has(page) {
					if content != nil {
						both++
					}
					content = got[page*pageset.PageBytes:][:pageset.PageBytes]
				}
				if content == nil {
					t.Fatalf("page %d is neither protected nor was it caught", page)
				}
				if !bytes.Equal(content, want[page*pageset.PageBytes:][:pageset.PageBytes]) {
					t.Fatalf("page %d is not what it was at the instant (protected: %v)", page, still.Has(page))
				}
			}
			t.Logf("%d pages caught, %d of them copied as well; %d faults", len(caught), both, g.Faults())
			if err := g.End(t.Context()); err != nil {
				t.Fatal(err)
			}
			m.goesOn()
			if n := m.protected().Count(); n != 0 {
				t.Errorf("%d pages are protected after the end", n)
			}
		})
	}
}

// TestProtectAgain has pages that were let go before the instant be guarded all the same.
func TestProtectAgain(t *testing.T) {
	m := newMemory(t, unix.MAP_PRIVATE)
	g := m.guard(10 * time.Second)
	if err := g.Protect(t.Context(), []Range{m.all()}); err != nil {
		t.Fatal(err)
	}
	m.bytes[0]++
	m.bytes[5*pageset.PageBytes]++
	if m.protected().Has(5) {
		t.Fatal("a page that was written is protected")
	}
	again := Range{m.start + 5*pageset.PageBytes, m.start + 6*pageset.PageBytes}
	if err := errors.Join(g.Protect(t.Context(), []Range{again}), g.Instant(t.Context())); err != nil {
		t.Fatal(err)
	}
	want := m.bytes[5*pageset.PageBytes]
	m.bytes[5*pageset.PageBytes]++
	m.bytes[0]++
	caught := map[uint64][]byte{}
	m.collect(g, caught)
	if len(caught) != 1 || caught[5] == nil || caught[5][0] != want {
		t.Errorf("caught %d pages, want page 5 alone as it was", len(caught))
	}
}

// TestRingFull has nobody take pages out of the ring: the guest's writes wait no longer than they may, and the guard is given up.
func TestRingFull(t *testing.T) {
	const bound = 200 * time.Millisecond
	m := newMemory(t, unix.MAP_PRIVATE)
	g := m.guard(bound)
	m.instant(g)
	var worst time.Duration
	for page := range pages {
		begin := time.Now()
		m.bytes[page*pageset.PageBytes]++
		worst = max(worst, time.Since(begin))
	}
	select {
	case <-g.Gone():
	case <-time.After(20 * time.Second):
		t.Fatal("the guard goes on though the ring is full")
	}
	if err := g.Flush(t.Context()); !errors.Is(err, ErrDropped) || g.dropped != uint64(dropFull) {
		t.Errorf("error %v, reason %#x; want that the ring was full", err, g.dropped)
	}
	m.write(2, time.Microsecond)
	m.goesOn()
	t.Logf("the longest write took %v of %v", worst, bound)
}

// TestKeeperSuffers kills and stops the keeper at every stage: writers go on, and the worker is told.
func TestKeeperSuffers(t *testing.T) {
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		for _, stage := range []string{"registered", "armed", "instant"} {
			t.Run(fmt.Sprintf("%v/%s", signal, stage), func(t *testing.T) {
				m := newMemory(t, unix.MAP_PRIVATE)
				m.write(4, 10*time.Microsecond)
				g := m.guard(300 * time.Millisecond)
				switch stage {
				case "armed":
					if err := g.Protect(t.Context(), []Range{m.all()}); err != nil {
						t.Fatal(err)
					}
				case "instant":
					m.instant(g)
				}
				if err := unix.Kill(g.PID(), signal); err != nil {
					t.Fatal(err)
				}
				if stage == "registered" && signal == unix.SIGSTOP {
					m.goesOn() // nobody waits for it
					return
				}
				select {
				case <-g.Gone():
				case <-time.After(20 * time.Second):
					t.Fatal("the keeper is still there")
				}
				m.goesOn()
				if err := g.Flush(t.Context()); !errors.Is(err, ErrDropped) {
					t.Errorf("error %v, want that it is given up", err)
				}
				if n := m.protected().Count(); n != 0 {
					t.Errorf("%d pages are protected still", n)
				}
			})
		}
	}
}

// TestWorkerGone closes the worker's end of the control socket, as its death does.
func TestWorkerGone(t *testing.T) {
	m := newMemory(t, unix.MAP_PRIVATE)
	m.write(4, 10*time.Microsecond)
	g := m.guard(10 * time.Second)
	m.instant(g)
	if err := unix.Shutdown(g.control, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Gone():
	case <-time.After(20 * time.Second):
		t.Fatal("the keeper is still there")
	}
	m.goesOn()
	if n := m.protected().Count(); n != 0 {
		t.Errorf("%d pages are protected still", n)
	}
}

// TestOwned guards memory that another userfaultfd has.
func TestOwned(t *testing.T) {
	m := newMemory(t, unix.MAP_PRIVATE)
	m.guard(time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		t.Fatalf("userfaultfd: %v", errno)
	}
	uffd := pagetable.Userfaultfd{File: os.NewFile(fd, "userfaultfd")}
	if _, err := uffd.API(pagetable.FeaturesGuard); err != nil {
		t.Fatal(err)
	}
	_, err := CopyOnWrite{PID: os.Getpid(), Userfaultfd: uffd.File, Areas: []Range{m.all()}}.Start(ctx)
	if !errors.Is(err, ErrDropped) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("guard memory that another userfaultfd has: error %v, want EBUSY", err)
	}
}
