package dirty

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// The process under tracking: the test binary, executed again, that maps memory and writes to it on command. Its main
// thread waits in ppoll, as QEMU's does.

// area is a block of the child's memory.
type area struct {
	Name   string `json:"name"`
	Pages  uint64 `json:"pages"`
	Shared bool   `json:"shared"`
	Huge   bool   `json:"huge"` // transparent huge pages
	File   string `json:"file"` // a file to map, in place of memory
	TLB    bool   `json:"tlb"`  // huge pages of hugetlbfs, 2 MiB
	Touch  bool   `json:"touch"`
}

// command is one line to the child, and answered by one line.
type command struct {
	Op    string `json:"op"`
	Area  int    `json:"area"`
	First uint64 `json:"first"`
	Count uint64 `json:"count"`
	Seed  uint64 `json:"seed"`
	FD    int    `json:"fd"`
	Areas []area `json:"areas"`
	Punch bool   `json:"punch"` // let random writers punch holes into shared memory
}

type answer struct {
	Error     string   `json:"error"`
	Addresses []uint64 `json:"addresses"`
}

// --- the child's side

type childMemory struct {
	areas  []area
	bytes  [][]byte
	stop   atomic.Bool
	work   sync.WaitGroup
	failed atomic.Value
}

// playMemory is called on the main thread.
func playMemory() {
	c := &childMemory{}
	in, out := bufio.NewReader(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		if in.Buffered() == 0 {
			fds := []unix.PollFd{{Fd: 0, Events: unix.POLLIN}}
			if _, err := unix.Ppoll(fds, nil, nil); err != nil && err != unix.EINTR {
				panic(err)
			}
			if fds[0].Revents == 0 {
				continue
			}
		}
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var cmd command
		if err := json.Unmarshal(line, &cmd); err != nil {
			panic(err)
		}
		var a answer
		if err := c.do(cmd, &a); err != nil {
			a.Error = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return
		}
	}
}

func (c *childMemory) do(cmd command, a *answer) error {
	var mem []byte
	if cmd.Op != "map" && cmd.Op != "start" && cmd.Op != "stop" && cmd.Op != "close" {
		mem = c.bytes[cmd.Area][cmd.First*4096 : (cmd.First+cmd.Count)*4096]
	}
	switch cmd.Op {
	case "map":
		for _, ar := range cmd.Areas {
			b, err := mapArea(ar)
			if err != nil {
				return err
			}
			c.areas, c.bytes = append(c.areas, ar), append(c.bytes, b)
			a.Addresses = append(a.Addresses, address(b))
		}
	case "write":
		for i := 0; i < len(mem); i += 4096 {
			mem[i+int(cmd.Seed%4096)]++
		}
	case "spread": // every so manieth page of the whole area
		for page := uint64(0); page < c.areas[cmd.Area].Pages; page += cmd.Seed {
			c.bytes[cmd.Area][page*4096]++
		}
	case "fill": // incompressible, whole
		rng := rand.NewChaCha8([32]byte{byte(cmd.Seed), 1})
		rng.Read(mem)
	case "read":
		for i := 0; i < len(mem); i += 4096 {
			sink.Add(int64(mem[i]))
		}
	case "dontneed":
		return unix.Madvise(mem, unix.MADV_DONTNEED)
	case "remove":
		return unix.Madvise(mem, unix.MADV_REMOVE)
	case "pageout":
		return unix.Madvise(mem, unix.MADV_PAGEOUT)
	case "unmap":
		return unmap(mem)
	case "remap":
		if err := unmap(mem); err != nil {
			return err
		}
		_, err := mapOver(mem, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1)
		return err
	case "close":
		return unix.Close(cmd.FD)
	case "start":
		c.stop.Store(false)
		for worker := range 2 {
			c.work.Add(1)
			go c.scribble(rand.New(rand.NewPCG(cmd.Seed, uint64(worker))), cmd.Punch)
		}
	case "stop":
		c.stop.Store(true)
		c.work.Wait()
		if err, _ := c.failed.Load().(error); err != nil {
			return err
		}
	default:
		return fmt.Errorf("no such command: %s", cmd.Op)
	}
	return nil
}

var sink atomic.Int64

// scribble changes memory in every way that a running machine does, until it is told to stop.
func (c *childMemory) scribble(rng *rand.Rand, punch bool) {
	defer c.work.Done()
	for n := 0; !c.stop.Load(); n++ {
		i := rng.IntN(len(c.areas))
		ar, b := c.areas[i], c.bytes[i]
		first := rng.Uint64N(ar.Pages)
		count := min(1+rng.Uint64N(8), ar.Pages-first)
		mem := b[first*4096 : (first+count)*4096]
		var err error
		switch k := rng.IntN(100); {
		case k < 60:
			for at := 0; at < len(mem); at += 4096 {
				mem[at+rng.IntN(4096)] = byte(rng.Uint32())
			}
		case k < 80:
			for at := 0; at < len(mem); at += 4096 {
				sink.Add(int64(mem[at]))
			}
		case k < 85: // private: given back; shared: only out of the page table
			err = unix.Madvise(mem, unix.MADV_DONTNEED)
		case k < 86 && ar.Pages > 1024:
			big := first / 512 * 512
			err = unix.Madvise(b[big*4096:min(big+512, ar.Pages)*4096], unix.MADV_DONTNEED)
		case k < 88 && ar.Shared && punch:
			err = unix.Madvise(mem, unix.MADV_REMOVE)
		case k < 90: // zeros over data: written, though uniform
			clear(mem)
		case k < 91: // pages out to swap where there is any, and from page tables
			err = unix.Madvise(mem, unix.MADV_PAGEOUT)
		default:
			runtime.Gosched()
		}
		if err != nil {
			c.failed.Store(fmt.Errorf("change memory: %w", err))
			return
		}
	}
}

// mapArea maps memory on a boundary of 2 MiB and one page, so that blocks are not aligned to huge pages unless they
// ask for them.
func mapArea(ar area) ([]byte, error) {
	flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
	size := int(ar.Pages * 4096)
	switch {
	case ar.File != "":
		var err error
		if fd, err = unix.Open(ar.File, unix.O_RDWR, 0); err != nil {
			return nil, err
		}
		flags = unix.MAP_PRIVATE
		if ar.Shared {
			flags = unix.MAP_SHARED
		}
	case ar.Shared:
		var err error
		kind := unix.MFD_CLOEXEC
		if ar.TLB {
			kind |= unix.MFD_HUGETLB | 21<<26 // 2 MiB: log2 at MFD_HUGE_SHIFT, include/uapi/linux/memfd.h
		}
		if fd, err = unix.MemfdCreate(ar.Name, kind); err != nil {
			return nil, err
		}
		if err := unix.Ftruncate(fd, int64(size)); err != nil {
			return nil, err
		}
		flags = unix.MAP_SHARED
	}
	reserved, err := unix.Mmap(-1, 0, size+4<<20, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	at := -address(reserved) & (2<<20 - 1) // to the next boundary
	if !ar.Huge && !ar.TLB {
		at += 4096
	}
	b, err := mapOver(reserved[at:at+uint64(size)], flags, fd)
	if err != nil {
		return nil, err
	}
	if ar.Huge {
		if err := unix.Madvise(b, unix.MADV_HUGEPAGE); err != nil {
			return nil, err
		}
	}
	if ar.Touch {
		for i := 0; i < size; i += 4096 {
			b[i] = 1
		}
	}
	return b, nil
}

// --- the test's side

type child struct {
	t      testing.TB
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *json.Decoder
	blocks []Block
	memory *pagetable.Memory
}

// startChild starts a process with the areas as its blocks.
func startChild(t testing.TB, areas ...area) *child {
	t.Helper()
	needTracking(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), testRoleVariable+"=memory")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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
	c := &child{t: t, cmd: cmd, in: in, out: json.NewDecoder(out)}
	t.Cleanup(c.kill)
	a := c.do(command{Op: "map", Areas: areas})
	for i, ar := range areas {
		b := Block{Name: ar.Name, HVA: a.Addresses[i], Bytes: ar.Pages * 4096, HostPageBytes: 4096}
		if ar.TLB {
			b.HostPageBytes = 2 << 20
		}
		c.blocks = append(c.blocks, b)
	}
	if c.memory, err = pagetable.OpenMemory(c.pid()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.memory.Close() })
	return c
}

// needTracking skips a test where the kernel or the rights for it are missing.
func needTracking(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("tracking another process needs root")
	}
	p, err := pagetable.OpenPagemap(os.Getpid())
	if err != nil {
		t.Skip(err)
	}
	defer p.Close()
	err = p.Scan(pagetable.ScanArgs{Start: 4096, End: 8192}, func(pagetable.Region) error { return nil })
	if errors.Is(err, pagetable.ErrUnsupported) {
		t.Skip("PAGEMAP_SCAN needs Linux 6.7")
	}
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) process() Process {
	c.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid()))
	if err != nil {
		c.t.Fatal(err)
	}
	fields := strings.Fields(string(text))
	start, err := strconv.ParseUint(fields[21], 10, 64) // the binary's name has no blanks
	if err != nil {
		c.t.Fatal(err)
	}
	return Process{PID: c.pid(), StartTime: start}
}

func (c *child) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
}

func (c *child) do(cmd command) answer {
	c.t.Helper()
	a, err := c.try(cmd)
	if err != nil {
		c.t.Fatalf("child: %s: %v", cmd.Op, err)
	}
	return a
}

func (c *child) try(cmd command) (answer, error) {
	text, err := json.Marshal(cmd)
	if err != nil {
		return answer{}, err
	}
	if _, err := c.in.Write(append(text, '\n')); err != nil {
		return answer{}, err
	}
	var a answer
	if err := c.out.Decode(&a); err != nil {
		return answer{}, err
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// op does one thing to a run of pages of an area.
func (c *child) op(op string, area int, first, count uint64) {
	c.t.Helper()
	c.do(command{Op: op, Area: area, First: first, Count: count})
}

// open opens a session of the child in dir.
func (c *child) open(dir string) *Session {
	c.t.Helper()
	s, err := Open(c.t.Context(), c.process(), c.blocks, dir, Options{})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { s.Close() })
	return s
}

// read returns all the memory of the blocks.
func (c *child) read() [][]byte {
	c.t.Helper()
	all := make([][]byte, len(c.blocks))
	for i, b := range c.blocks {
		all[i] = make([]byte, b.Bytes)
		if err := c.memory.Read(all[i], b.HVA); err != nil {
			c.t.Fatal(err)
		}
	}
	return all
}

// standing is a standstill for tests: the child is told to do nothing.
type standing struct{ err error }

func (s *standing) Err() error { return s.err }

// takeImage does what a capture does with an instant: every page of it, and zeros for the holes. Pages that are in
// neither keep what the parent has.
func takeImage(parent, memory [][]byte, in *Instant) [][]byte {
	image := make([][]byte, len(parent))
	for i := range parent {
		image[i] = append([]byte(nil), parent[i]...)
		for r := range in.Pages[i].Runs() {
			copy(image[i][r.First*pageset.PageBytes:], memory[i][r.First*pageset.PageBytes:r.End()*pageset.PageBytes])
		}
		for r := range in.Holes[i].Runs() {
			clear(image[i][r.First*pageset.PageBytes : r.End()*pageset.PageBytes])
		}
	}
	return image
}

// differing lists the pages in which two memories differ.
func differing(blocks []Block, a, b [][]byte) Sets {
	d := NewSets(blocks)
	for i := range blocks {
		for page := range blocks[i].Pages() {
			at := page * pageset.PageBytes
			if string(a[i][at:at+pageset.PageBytes]) != string(b[i][at:at+pageset.PageBytes]) {
				d[i].Add(pageset.Run{First: page, Count: 1})
			}
		}
	}
	return d
}
