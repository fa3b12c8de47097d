package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

const ramBlocks72 = `              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000020000 0x0000000000200000
`

const ramBlocks10 = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n" +
	"                  pc.ram    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007fe19fe00000  rw\r\n" +
	"0000:00:04.0/virtio-net-pci.rom    4 KiB  0x0000000009080000 0x0000000000010000 0x0000000000010000 0x00007fe19e200000  ro\r\n" +
	"    /rom@a name of words    4 KiB  0x00000000092c0000 0x0000000000000600 0x0000000000010000 0x00007fe19ca00000  ro\r\n"

func TestParseRAMBlocks(t *testing.T) {
	for name, c := range map[string]struct {
		text   string
		want   []ramBlockRow
		hasHVA bool
	}{
		"7.2": {ramBlocks72, []ramBlockRow{
			{name: "pc.ram", usedBytes: 0x10000000, totalBytes: 0x10000000},
			{name: "/rom@etc/acpi/tables", offset: 0x11140000, usedBytes: 0x20000, totalBytes: 0x200000},
		}, false},
		"10": {ramBlocks10, []ramBlockRow{
			{name: "pc.ram", usedBytes: 0x8000000, totalBytes: 0x8000000, hva: 0x7fe19fe00000},
			{"0000:00:04.0/virtio-net-pci.rom", 0x9080000, 0x10000, 0x10000, 0x7fe19e200000, true},
			{"/rom@a name of words", 0x92c0000, 0x600, 0x10000, 0x7fe19ca00000, true},
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, hasHVA, err := parseRAMBlocks(c.text)
			if err != nil || hasHVA != c.hasHVA {
				t.Fatalf("HVA %v, error %v", hasHVA, err)
			}
			if d := cmp.Diff(c.want, got, cmp.AllowUnexported(ramBlockRow{})); d != "" {
				t.Error(d)
			}
		})
	}
	head, row, _ := strings.Cut(ramBlocks72, "\n")
	row, _, _ = strings.Cut(row, "\n")
	for name, text := range map[string]string{
		"nothing":          "",
		"no rows":          head + "\n",
		"an error message": "unknown command: 'info ramblock'\n",
		"a name twice":     head + "\n" + row + "\n" + row + "\n",
		"no name":          head + "\n" + strings.Replace(row, "pc.ram", "      ", 1) + "\n",
		"used over total":  head + "\n" + strings.Replace(row, "0x0000000010000000 0x00", "0x0000000010001000 0x00", 1) + "\n",
		"HVA missing":      strings.Replace(ramBlocks10, "0x00007fe19e200000  ro", "", 1),
		"HVA unannounced":  head + "\n" + row + " 0x00007fe19e200000  ro\n",
	} {
		if _, _, err := parseRAMBlocks(text); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseRAMBlocks(f *testing.F) {
	f.Add(ramBlocks72)
	f.Add(ramBlocks10)
	f.Fuzz(func(t *testing.T, text string) {
		rows, _, err := parseRAMBlocks(text)
		if err != nil {
			return
		}
		for _, r := range rows {
			if r.name == "" || r.usedBytes > r.totalBytes || roundUp(r.usedBytes) < r.usedBytes {
				t.Errorf("accepted %+v", r)
			}
		}
	})
}

func TestCover(t *testing.T) {
	maps, err := pagetable.ParseMappings(strings.NewReader(`1000-3000 rw-p 00000000 00:00 0
3000-4000 r--p 00000000 00:00 0
5000-6000 ---p 00000000 00:00 0
10000-12000 rw-s 00004000 00:01 77                         /memfd:a name (deleted)
12000-13000 r--s 00006000 00:01 77                         /memfd:a name (deleted)
13000-14000 rw-s 00000000 00:01 78                         /memfd:b (deleted)
15000-16000 rw-s 00000000 00:01 77                         /memfd:a name (deleted)
16000-17000 rw-s 00005000 00:01 77                         /memfd:a name (deleted)
fffffffffffff000-ffffffffffffffff --xp 00000000 00:00 0
`))
	if err != nil {
		t.Fatal(err)
	}
	if maps[3].Path != "/memfd:a name (deleted)" || maps[3].Inode != 77 {
		t.Errorf("mapping read as %+v", maps[3])
	}
	for name, c := range map[string]struct {
		hva, bytes uint64
		offset     uint64
		reason     string
	}{
		"one mapping":              {0x1000, 0x1000, 0, ""},
		"split in two":             {0x2000, 0x2000, 0, ""},
		"in a file":                {0x11000, 0x2000, 0x5000, ""},
		"hole behind":              {0x3000, 0x2000, 0, "nothing is mapped at 0x4000"},
		"hole before":              {0x0, 0x2000, 0, "nothing is mapped at 0x0"},
		"not readable":             {0x5000, 0x1000, 0, "its memory at 0x5000 cannot be read"},
		"into another file":        {0x12000, 0x2000, 0, "other memory begins in its middle, at 0x13000"},
		"elsewhere in one file":    {0x15000, 0x2000, 0, "other memory begins in its middle, at 0x16000"},
		"behind all":               {0xfffffffffffffffe, 1, 0, "its memory at 0xfffffffffffffffe cannot be read"},
		"around the address space": {0xfffffffffffff000, 0x2000, 0, "its range at 0xfffffffffffff000 wraps around"},
	} {
		t.Run(name, func(t *testing.T) {
			got, reason := cover(maps, c.hva, c.bytes)
			if reason != c.reason || reason == "" && got.fileOffset != c.offset {
				t.Errorf("offset %#x, reason %q; want %#x, %q", got.fileOffset, reason, c.offset, c.reason)
			}
		})
	}
}

// fakeMemory is a process's memory made of pieces.
type fakeMemory map[uint64][]byte

func (f fakeMemory) ReadAt(p []byte, off int64) (int, error) {
	for at, b := range f {
		if uint64(off) >= at && uint64(off)+uint64(len(p)) <= at+uint64(len(b)) {
			return copy(p, b[uint64(off)-at:]), nil
		}
	}
	return 0, errors.New("not mapped")
}

func TestFindChains(t *testing.T) {
	rows, _, err := parseRAMBlocks(ramBlocks72)
	if err != nil {
		t.Fatal(err)
	}
	const heap, heapBytes = 0x10000, 3 << 20
	put := func(mem []byte, at int, r ramBlockRow, hva, next uint64) {
		s := mem[at:]
		for offset, v := range map[int]uint64{ramBlockHost: hva, ramBlockOffset: r.offset, ramBlockUsed: r.usedBytes,
			ramBlockTotal: r.totalBytes, ramBlockNext: next} {
			binary.LittleEndian.PutUint64(s[offset:], v)
		}
		copy(s[ramBlockIDStr:], r.name)
	}
	const first, second = 1<<20 - 100, 2 << 20 // the first lies across the border of two pieces
	intact := func() []byte {
		mem := make([]byte, heapBytes)
		copy(mem[50:], "pc.ram\x00 by itself")
		put(mem, first, rows[0], 0x7000000, heap+second)
		put(mem, second, rows[1], 0x8000000, 0)
		return mem
	}
	maps := []pagetable.Mapping{{Start: heap, End: heap + heapBytes, Read: true, Write: true, Path: "[heap]"}}
	for name, c := range map[string]struct {
		change func(mem []byte)
		want   [][]uint64
	}{
		"found":          {func([]byte) {}, [][]uint64{{0x7000000, 0x8000000}}},
		"a further one":  {func(m []byte) { put(m, second, rows[1], 1, heap+first) }, nil},
		"one too few":    {func(m []byte) { put(m, first, rows[0], 1, 0) }, nil},
		"another length": {func(m []byte) { m[second+ramBlockUsed]++ }, nil},
		"another name":   {func(m []byte) { m[second+ramBlockIDStr]++ }, nil},
		"out of memory":  {func(m []byte) { put(m, first, rows[0], 1, 0xdead0000) }, nil},
		"twice": {func(m []byte) { put(m, 100, rows[0], 5, heap+second) },
			[][]uint64{{5, 0x8000000}, {0x7000000, 0x8000000}}},
	} {
		t.Run(name, func(t *testing.T) {
			mem := intact()
			c.change(mem)
			got, err := findChains(t.Context(), fakeMemory{heap: mem}, maps, rows)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// The addresses are right if the bytes there are those that QEMU itself reads from the guest.
func TestLayoutOfRealQEMU(t *testing.T) {
	devices := []string{"-machine", "q35", "-device", "VGA", "-device", "virtio-net-pci", "-device", "e1000", "-S"}
	for name, memory := range map[string][]string{
		"private": {"-m", "64"},
		"memfd":   {"-m", "64", "-object", "memory-backend-memfd,id=m,size=64M,share=on", "-machine", "memory-backend=m"},
		"numa": {"-m", "64", "-smp", "2", "-object", "memory-backend-ram,id=m0,size=32M", "-object", "memory-backend-ram,id=m1,size=32M",
			"-numa", "node,memdev=m0", "-numa", "node,memdev=m1"},
	} {
		t.Run(name, func(t *testing.T) {
			forEachQEMU(t, func(t *testing.T, e emulator) {
				g := e.start(t, nil, append(devices, memory...)...)
				m, p := g.dial(t), g.find(t)
				layout, err := ReadLayout(t.Context(), m, p)
				if err != nil {
					t.Fatal(err)
				}
				again, err := ReadLayout(t.Context(), m, p)
				if err != nil || !layout.Equal(again) || layout.Digest() != again.Digest() {
					t.Errorf("read again: %v, %s", err, cmp.Diff(layout, again))
				}
				if err := layout.Check(p); err != nil {
					t.Error(err)
				}
				t.Logf("%d blocks, %d bytes; first %+v", len(layout), layout.Bytes(), layout[0])
				if shared := name == "memfd"; layout[0].Shared != shared || (layout[0].Backing.Kind == BackingShmem) != shared {
					t.Errorf("main memory is %+v", layout[0])
				}
				readsLikeQEMU(t, p, layout)
				moved := append(Layout(nil), layout...)
				moved[1].HVA = 0x1000
				var place *LayoutError
				if err := moved.Check(p); !errors.As(err, &place) || place.Block != moved[1].Name {
					t.Errorf("a moved block gave %v", err)
				}
			})
		})
	}
}

// readsLikeQEMU looks at the blocks whose content is known beforehand: option ROMs begin with 55 AA, the BIOS ends with
// its reset vector, the tables for the firmware have their signatures.
func readsLikeQEMU(t *testing.T, p *Process, layout Layout) {
	t.Helper()
	mem, err := os.Open(p.dir() + "/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	read := func(hva uint64, n int) []byte {
		b := make([]byte, n)
		if _, err := mem.ReadAt(b, int64(hva)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	roms := 0
	for _, b := range layout {
		switch {
		case strings.HasSuffix(b.Name, "/vga.rom"), strings.HasSuffix(b.Name, "/e1000.rom"), strings.HasSuffix(b.Name, "/virtio-net-pci.rom"):
			if got := read(b.HVA, 2); !bytes.Equal(got, []byte{0x55, 0xaa}) {
				t.Errorf("%s begins with % x", b.Name, got)
			}
			roms++
		case b.Name == "pc.bios":
			if got := read(b.HVA+b.Bytes-16, 1); got[0] != 0xea { // a far jump
				t.Errorf("the reset vector is % x", got)
			}
			roms++
		case b.Name == "/rom@etc/acpi/tables":
			if !bytes.Contains(read(b.HVA, int(b.Bytes)), []byte("FACP")) {
				t.Error("no FACP among the ACPI tables")
			}
			roms++
		case b.Name == "/rom@etc/table-loader":
			if !bytes.Contains(read(b.HVA, int(b.Bytes)), []byte("etc/acpi/rsdp")) {
				t.Error("the table loader does not name the RSDP")
			}
			roms++
		}
	}
	if roms != 6 {
		t.Errorf("looked at %d ROMs, want 6", roms)
	}
}
