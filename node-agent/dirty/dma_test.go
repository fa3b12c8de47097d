package dirty

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// Why a live harvest needs a barrier before its pages are copied: a device that was given a page's physical address
// before the harvest writes it afterwards without passing the page tables. The page is in the live harvest, and in
// none that follows.
func TestPinnedPagesNeedBarrier(t *testing.T) {
	for name, shared := range map[string]bool{"private": false, "shared": true} {
		t.Run(name, func(t *testing.T) {
			const first, pages = 100, 512
			c := startChild(t, area{Name: "ram", Pages: 1024, Shared: shared})
			c.op("fill", 0, 0, 1024)
			s := c.open(t.TempDir())
			if err := s.Sealed(harvest(t, s), Image{"base", "0"}); err != nil {
				t.Fatal(err)
			}
			base := c.read()

			d := startDevice(t, c.pid(), c.blocks[0].HVA+first*pageset.PageBytes, pages)
			live, err := s.HarvestLive(t.Context())
			if err != nil || live.Unknown != nil {
				t.Fatal(err, live)
			}
			early := c.read() // what a capture without a barrier would have copied

			// The barrier: a standstill with all I/O drained. Afterwards a page of the live harvest is like any other.
			d.finish()
			late := c.read()

			in, err := s.HarvestStanding(t.Context(), &standing{})
			if err != nil || in.Unknown != nil {
				t.Fatal(err, in)
			}
			truth := c.read()
			if d := differing(c.blocks, truth, takeImage(base, late, in)); d.Count() > 0 {
				t.Fatalf("%d pages differ though they were copied after the barrier", d.Count())
			}
			// Without one: the live harvest's pages as they were then, and again those that the standstill reports as
			// written.
			image := takeImage(base, early, &Instant{Pages: live.Written, Holes: NewSets(c.blocks)})
			image = takeImage(image, truth, &Instant{Pages: in.Written, Holes: in.Holes})
			if lost := differing(c.blocks, truth, image).Count(); lost != pages {
				t.Errorf("the device wrote %d pages after the live harvest; without the barrier %d of them were lost", pages, lost)
			}
		})
	}
}

// device writes to the memory of a process as a device does: it has the physical addresses of the pages first and writes to them later.
//
// It is process_vm_writev, which pins the pages and then copies to them through the kernel's own mapping (mm/process_vm_access.c, up to 1,024
// pages at once). What it copies from is memory under a userfaultfd, so that it waits between the two for as long as the test wants.
type device struct {
	t       *testing.T
	uffd    *os.File
	written chan error
}

// startDevice returns when the pages are pinned and none of them is written. The device will write zeros.
func startDevice(t *testing.T, pid int, hva, pages uint64) *device {
	t.Helper()
	bytes := pages * pageset.PageBytes
	source, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		t.Skipf("userfaultfd is missing: %v", errno)
	}
	d := &device{t: t, uffd: os.NewFile(fd, "userfaultfd"), written: make(chan error, 1)}
	uffd := pagetable.Userfaultfd{File: d.uffd}
	if _, err := uffd.API(0); err != nil {
		t.Fatal(err)
	}
	if err := uffd.Register(address(source), bytes, pagetable.ModeMissing); err != nil {
		t.Fatal(err)
	}
	go func() {
		local := unix.Iovec{Base: &source[0], Len: bytes}
		n, err := unix.ProcessVMWritev(pid, []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(hva), Len: int(bytes)}}, 0)
		if err == nil && n != int(bytes) {
			err = fmt.Errorf("%d bytes of %d", n, bytes)
		}
		d.written <- err
	}()
	t.Cleanup(func() {
		d.uffd.Close()
		unix.Munmap(source) //nolint:errcheck // it goes with the process
	})
	// The fault on the first page of the source: the pages to be written are pinned by then.
	for deadline := time.Now().Add(20 * time.Second); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		switch {
		case err != nil && err != unix.EINTR:
			t.Fatal(err)
		case n == 1:
			return d
		case time.Now().After(deadline):
			t.Fatal("the device does not begin")
		}
	}
}

// finish lets the device write, and returns when it has: with its userfaultfd closed the source reads as zeros.
func (d *device) finish() {
	d.t.Helper()
	if err := d.uffd.Close(); err != nil {
		d.t.Fatal(err)
	}
	if err := <-d.written; err != nil {
		d.t.Fatalf("the device's write: %v", err)
	}
}
