package evict

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// mapping is memory of this test's own process.
type mapping struct {
	bytes []byte
	fd    int
}

func mapMemory(t testing.TB, pages, flags, fd int, offset int64) mapping {
	t.Helper()
	b, err := unix.Mmap(fd, offset, pages*4096, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return mapping{b, fd}
}

func memfd(t testing.TB, pages int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(pages)*4096); err != nil {
		t.Fatal(err)
	}
	return fd
}

func (m mapping) start() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m.bytes)))) }
func (m mapping) end() uint64   { return m.start() + uint64(len(m.bytes)) }

func (m mapping) resolve(t testing.TB) *Memory {
	t.Helper()
	mappings, err := pagetable.Maps(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	r, err := Resolve(os.Getpid(), mappings, m.start(), m.end())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func openSelf(t testing.TB) *pagetable.Pagemap {
	t.Helper()
	p, err := pagetable.OpenPagemap(os.Getpid())
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { p.Close() })
	err = p.Scan(pagetable.ScanArgs{Start: 4096, End: 8192}, func(pagetable.Region) error { return nil })
	if errors.Is(err, pagetable.ErrUnsupported) {
		t.Skip("PAGEMAP_SCAN needs Linux 6.7")
	}
	return p
}

func holes(t *testing.T, m *Memory, p *pagetable.Pagemap) *pageset.Set {
	t.Helper()
	set, err := m.Unpopulated(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestUnpopulated(t *testing.T) {
	p := openSelf(t)
	const anonymous = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	for _, c := range []struct {
		name    string
		backing Backing
		memory  func(t *testing.T) mapping
		want    []pageset.Run
	}{
		{"private", Anonymous, func(t *testing.T) mapping {
			m := mapMemory(t, 32, anonymous, -1, 0)
			m.bytes[3*4096], m.bytes[9*4096], m.bytes[10*4096] = 1, 1, 1
			unix.Madvise(m.bytes[9*4096:10*4096], unix.MADV_DONTNEED)
			return m
		}, []pageset.Run{{First: 0, Count: 3}, {First: 4, Count: 6}, {First: 11, Count: 21}}},
		{"shared, written here", SharedMemory, func(t *testing.T) mapping {
			m := mapMemory(t, 32, unix.MAP_SHARED, memfd(t, 32), 0)
			m.bytes[3*4096], m.bytes[9*4096] = 1, 1
			unix.Madvise(m.bytes[9*4096:10*4096], unix.MADV_DONTNEED) // not in the page table, and still in the file
			return m
		}, []pageset.Run{{First: 0, Count: 3}, {First: 4, Count: 5}, {First: 10, Count: 22}}},
		{"shared, written by another, part of the file", SharedMemory, func(t *testing.T) mapping {
			fd := memfd(t, 64)
			for _, page := range []int64{0, 20, 63} {
				unix.Pwrite(fd, []byte{1}, page*4096)
			}
			return mapMemory(t, 32, unix.MAP_SHARED, fd, 16*4096)
		}, []pageset.Run{{First: 0, Count: 4}, {First: 5, Count: 27}}},
		{"shared, beyond the end of the file", SharedMemory, func(t *testing.T) mapping {
			fd := memfd(t, 10)
			unix.Pwrite(fd, []byte{1}, 9*4096)
			unix.Ftruncate(fd, 9*4096+100)
			return mapMemory(t, 32, unix.MAP_SHARED, fd, 0)
		}, []pageset.Run{{First: 0, Count: 9}, {First: 10, Count: 22}}},
		{"shared, all populated", SharedMemory, func(t *testing.T) mapping {
			m := mapMemory(t, 32, unix.MAP_SHARED|unix.MAP_POPULATE, memfd(t, 32), 0)
			return m
		}, nil},
		{"shared anonymous", SharedMemory, func(t *testing.T) mapping {
			m := mapMemory(t, 32, unix.MAP_SHARED|unix.MAP_ANONYMOUS, -1, 0)
			m.bytes[0] = 1
			return m
		}, []pageset.Run{{First: 1, Count: 31}}},
		{"private copy of a file", Other, func(t *testing.T) mapping {
			return mapMemory(t, 32, unix.MAP_PRIVATE, memfd(t, 32), 0)
		}, nil},
		{"file on a disk", Other, func(t *testing.T) mapping {
			f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			if err := f.Truncate(32 * 4096); err != nil {
				t.Fatal(err)
			}
			var st unix.Statfs_t
			if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type == unix.TMPFS_MAGIC {
				t.Skip("temporary files are in memory here")
			}
			return mapMemory(t, 32, unix.MAP_SHARED, int(f.Fd()), 0)
		}, nil},
		{"pieced together", Other, func(t *testing.T) mapping {
			fd := memfd(t, 64)
			m := mapMemory(t, 32, unix.MAP_SHARED, fd, 0)
			if _, err := unix.MmapPtr(fd, 40*4096, unsafe.Pointer(&m.bytes[16*4096]), 4096, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
				t.Fatal(err)
			}
			return m
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := c.memory(t).resolve(t)
			if m.Backing != c.backing {
				t.Fatalf("backing is %v, want %v", m.Backing, c.backing)
			}
			if diff := cmp.Diff(c.want, slices.Collect(holes(t, m, p).Runs())); diff != "" {
				t.Errorf("holes (-want +got):\n%s", diff)
			}
		})
	}
}

// What is called unpopulated reads as zeros, and nothing that was written is.
func TestUnpopulatedAgainstContent(t *testing.T) {
	p := openSelf(t)
	rng := rand.New(rand.NewPCG(3, 4))
	for _, shared := range []bool{false, true} {
		for range 50 {
			const pages = 700
			flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
			if shared {
				flags, fd = unix.MAP_SHARED, memfd(t, pages)
			}
			m := mapMemory(t, pages, flags, fd, 0)
			for range rng.IntN(40) {
				first := rng.IntN(pages)
				part := m.bytes[first*4096 : min(first+1+rng.IntN(30), pages)*4096]
				switch rng.IntN(4) {
				case 0:
					unix.Madvise(part, unix.MADV_DONTNEED)
				case 1:
					if shared {
						unix.Madvise(part, unix.MADV_REMOVE)
					}
				default:
					for i := 0; i < len(part); i += 4096 {
						part[i] = 1
					}
				}
			}
			memory := m.resolve(t)
			unmapped := map[string][]pageset.Run{}
			for name, find := range map[string]func(*pagetable.Pagemap, uint64, uint64, pagetable.Categories, func(start, end uint64) error) error{
				"scan": scanUnmapped, "entries": readUnmapped,
			} {
				found := pageset.New(memory.Pages())
				if err := find(p, memory.Start, memory.End, pagetable.CategoryPresent|pagetable.CategorySwapped, func(start, end uint64) error {
					found.Add(pageset.Run{First: (start - memory.Start) / 4096, Count: (end - start) / 4096})
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				unmapped[name] = slices.Collect(found.Runs())
			}
			if diff := cmp.Diff(unmapped["scan"], unmapped["entries"]); diff != "" {
				t.Fatalf("shared %v: unmapped pages by scan and by reading every entry:\n%s", shared, diff)
			}
			set := holes(t, memory, p)
			for page := range uint64(pages) {
				if zero := m.bytes[page*4096] == 0; zero != set.Has(page) {
					t.Fatalf("shared %v: page %d has content %v and is a hole %v", shared, page, !zero, set.Has(page))
				}
			}
		}
	}
}

func TestCover(t *testing.T) {
	mappings := []pagetable.Mapping{{Start: 0x1000, End: 0x3000}, {Start: 0x3000, End: 0x4000}, {Start: 0x6000, End: 0x9000}}
	for _, c := range []struct {
		start, end uint64
		parts      int // 0: not covered
	}{
		{0x1000, 0x3000, 1}, {0x1000, 0x4000, 2}, {0x2000, 0x4000, 2}, {0x6000, 0x7000, 1}, {0x8000, 0x9000, 1},
		{0x0000, 0x2000, 0}, {0x3000, 0x5000, 0}, {0x3000, 0x7000, 0}, {0x8000, 0xa000, 0}, {0x4000, 0x5000, 0}, {0xa000, 0xb000, 0},
	} {
		parts, err := Cover(mappings, c.start, c.end)
		if len(parts) != c.parts || errors.Is(err, ErrUnmapped) != (c.parts == 0) {
			t.Errorf("[%#x,%#x): %d parts, %v; want %d", c.start, c.end, len(parts), err, c.parts)
		}
	}
	if _, err := Cover(nil, 0x1000, 0x2000); !errors.Is(err, ErrUnmapped) {
		t.Errorf("no mappings: %v", err)
	}
}

// Memory that was never touched, and memory of which every second page was.
func BenchmarkUnpopulated(b *testing.B) {
	for _, c := range []struct {
		name   string
		shared bool
		every  int
	}{{"private, untouched", false, 0}, {"shared, untouched", true, 0}, {"private, every second page", false, 2}, {"shared, every second page", true, 2}} {
		b.Run(c.name, func(b *testing.B) {
			const pages = 1 << 18 // 1 GiB
			p := openSelf(b)
			flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
			if c.shared {
				flags, fd = unix.MAP_SHARED, memfd(b, pages)
			}
			m := mapMemory(b, pages, flags, fd, 0)
			for page := 0; c.every > 0 && page < pages; page += c.every {
				m.bytes[page*4096] = 1
			}
			memory := m.resolve(b)
			b.SetBytes(pages * 4096)
			for b.Loop() {
				if _, err := memory.Unpopulated(b.Context(), p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
