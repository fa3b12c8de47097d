package qemu

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What `info mtree -f` of a q35 machine prints, cut; the second view and what is in it as QEMU has it with system management mode.
const flatViews = "FlatView #0\r\n" +
	" AS \"memory\", root: system\r\n" +
	" AS \"cpu-memory-0\", root: system\r\n" +
	" Root memory region: system\r\n" +
	"  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\r\n" +
	"  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r\n" +
	"  00000000000c0000-00000000000dffff (prio 1, rom): pc.ram @00000000000c0000 KVM\r\n" +
	"  0000000000100000-000000003fffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r\n" +
	"  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram KVM\r\n" +
	"  00000000fec00000-00000000fec00fff (prio 0, i/o): kvm-ioapic\r\n" +
	"  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM\r\n" +
	"\r\nFlatView #1\r\n AS \"I/O\", root: io\r\n Root memory region: io\r\n" +
	"  0000000000000000-0000000000000fff (prio 0, ram): pc.ram KVM\r\n" +
	"\r\nFlatView #2\r\n AS \"KVM-SMRAM\", root: mem-smram\r\n Root memory region: mem-smram\r\n" +
	"  0000000000000000-000000003fffffff (prio 0, ram): pc.ram KVM\r\n"

func TestGuestRanges(t *testing.T) {
	layout := Layout{{Name: "pc.ram", Bytes: 1 << 30}, {Name: "vga.vram", Bytes: 16 << 20}, {Name: "pc.bios", Bytes: 256 << 10, ReadOnly: true}}
	got, err := parseFlatViews(flatViews, layout)
	if err != nil {
		t.Fatal(err)
	}
	want := []GuestRange{
		{0, 0, 0xa0000, 0, 0},
		{0, 0x100000, 0x3ff00000, 0, 0x100000},
		{1, 0, 1 << 30, 0, 0},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ranges (-want +got):\n%s", diff)
	}
	layout[0].Bytes = 512 << 20
	if got, err := parseFlatViews(flatViews, layout); err == nil {
		t.Errorf("ranges beyond their block: %+v", got)
	}
	if got, err := parseFlatViews("nothing of the kind", layout); len(got) != 0 || err != nil {
		t.Errorf("ranges %+v, %v", got, err)
	}
}

func FuzzFlatViews(f *testing.F) {
	f.Add(flatViews)
	layout := Layout{{Name: "pc.ram", Bytes: 1 << 30}}
	f.Fuzz(func(t *testing.T, text string) {
		ranges, err := parseFlatViews(text, layout)
		for _, r := range ranges {
			if err != nil || r.OffsetBytes > 1<<30 || r.Bytes == 0 || r.Bytes > 1<<30-r.OffsetBytes {
				t.Errorf("range %+v, %v", r, err)
			}
		}
	})
}
