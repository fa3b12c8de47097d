package pagetable

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const pageBytes = 4096

// regionBytes is the size of each of the child's memory regions: more pages than one pagemap read takes, and, every
// other page written, more runs than one PAGEMAP_SCAN returns.
const regionBytes = 40 << 20

const regionPages = regionBytes / pageBytes

// The child's memory regions.
const (
	small    = "private"  // anonymous, 4 KiB pages
	huge     = "huge"     // anonymous, transparent huge pages
	shared   = "memfd"    // a shared memory file
	readOnly = "readonly" // one page, written and then protected
)

// order is what the child is told to do with pages of a region, by stores of its own.
type order struct {
	Region  string
	Write   []uint64 // pages to get a new first word
	Discard []uint64 // pages to be given back with MADV_DONTNEED
}

// childState is what it tells first.
type childState struct {
	Addresses    map[string]uint64
	Userfaultfds [2]int
}

func childMain() {
	regions := map[string][]byte{}
	state := childState{Addresses: map[string]uint64{}}
	add := func(name string, b []byte) {
		regions[name] = b
		state.Addresses[name] = uint64(uintptr(unsafe.Pointer(&b[0])))
	}
	add(small, anonymous(regionBytes, unix.MADV_NOHUGEPAGE))
	add(huge, anonymous(regionBytes, unix.MADV_HUGEPAGE))
	fd, err := unix.MemfdCreate("guest ram", unix.MFD_CLOEXEC)
	check(err)
	check(unix.Ftruncate(fd, regionBytes))
	b, err := unix.Mmap(fd, 0, regionBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(err)
	add(shared, b)
	add(readOnly, anonymous(pageBytes, unix.MADV_NOHUGEPAGE))
	regions[readOnly][0] = 1
	check(unix.Mprotect(regions[readOnly], unix.PROT_READ))
	for i := range state.Userfaultfds {
		const userModeOnly = 1
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly, 0, 0)
		if errno != 0 {
			check(errno)
		}
		state.Userfaultfds[i] = int(fd)
	}
	out, in := json.NewEncoder(os.Stdout), json.NewDecoder(os.Stdin)
	check(out.Encode(state))
	for stamp := uint64(1); ; stamp++ {
		var o order
		if in.Decode(&o) != nil {
			os.Exit(0)
		}
		for _, page := range o.Write {
			binary.NativeEndian.PutUint64(regions[o.Region][page*pageBytes:], stamp)
		}
		for _, page := range o.Discard {
			check(unix.Madvise(regions[o.Region][page*pageBytes:][:pageBytes], unix.MADV_DONTNEED))
		}
		check(out.Encode(stamp))
	}
}

// anonymous maps private memory, aligned to huge pages, with a gap on both sides.
func anonymous(bytes, advice int) []byte {
	const alignment = 2 << 20
	b, err := unix.Mmap(-1, 0, bytes+2*alignment, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	check(err)
	offset := alignment - int(uintptr(unsafe.Pointer(&b[0]))%alignment)
	b = b[offset : offset+bytes : offset+bytes]
	check(unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE))
	check(unix.Madvise(b, advice))
	return b
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// child is that process, seen from the test.
type child struct {
	t   testing.TB
	pid int
	childState
	in  *json.Encoder
	out *json.Decoder
}

func startChild(t testing.TB) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childMark + "=1"}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c := &child{t: t, pid: cmd.Process.Pid, in: json.NewEncoder(in), out: json.NewDecoder(bufio.NewReader(out))}
	if err := c.out.Decode(&c.childState); err != nil {
		t.Fatalf("child did not start: %v", err)
	}
	return c
}

func (c *child) do(o order) {
	c.t.Helper()
	if err := c.in.Encode(o); err != nil {
		c.t.Fatalf("child is gone: %v", err)
	}
	var stamp uint64
	if err := c.out.Decode(&stamp); err != nil {
		c.t.Fatalf("child is gone: %v", err)
	}
}

// userfaultfd returns one of the child's userfaultfds, its features agreed on for asynchronous write protection.
func (c *child) userfaultfd(i int) Userfaultfd {
	c.t.Helper()
	u := c.rawUserfaultfd(i)
	if _, err := u.API(FeaturesAsyncWriteTracks); errors.Is(err, ErrUnsupported) {
		c.t.Skip("needs asynchronous write protection, Linux 6.7")
	} else if err != nil {
		c.t.Fatal(err)
	}
	return u
}

func (c *child) rawUserfaultfd(i int) Userfaultfd {
	c.t.Helper()
	pidfd, err := unix.PidfdOpen(c.pid, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, c.Userfaultfds[i], 0)
	if err != nil {
		c.t.Skipf("needs the right to trace a child: %v", err)
	}
	u := Userfaultfd{os.NewFile(uintptr(fd), fmt.Sprintf("userfaultfd %d", i))}
	c.t.Cleanup(func() { _ = u.Close() })
	return u
}

func (c *child) pagemap() *Pagemap {
	c.t.Helper()
	p, err := OpenPagemap(c.pid)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = p.Close() })
	return p
}

func (c *child) memory() *Memory {
	c.t.Helper()
	m, err := OpenMemory(c.pid)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = m.Close() })
	return m
}

// pagesOf returns first, first+step, … below end.
func pagesOf(first, end, step uint64) []uint64 {
	var pages []uint64
	for page := first; page < end; page += step {
		pages = append(pages, page)
	}
	return pages
}
