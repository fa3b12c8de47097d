package restore

import (
	"iter"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

func TestRuns(t *testing.T) {
	set := pageset.New(1000)
	set.Add(pageset.Run{First: 10, Count: 5})
	set.Add(pageset.Run{First: 20, Count: 1})
	data := make([]byte, 6*pageset.PageBytes)
	for _, page := range []int{0, 1, 4} {
		data[page*pageset.PageBytes+4095] = 1
	}
	for _, tt := range []struct {
		name string
		got  iter.Seq[pageset.Run]
		want []pageset.Run
	}{
		{"chunks", chunks(pageset.Run{First: 3, Count: 600}), []pageset.Run{{First: 3, Count: 256}, {First: 259, Count: 256}, {First: 515, Count: 88}}},
		{"chunks of nothing", chunks(pageset.Run{First: 3}), nil},
		{"within", within(set, pageset.Run{First: 12, Count: 100}), []pageset.Run{{First: 12, Count: 3}, {First: 20, Count: 1}}},
		{"within ends in a member", within(set, pageset.Run{First: 0, Count: 12}), []pageset.Run{{First: 10, Count: 2}}},
		{"without", without(set, pageset.Run{First: 12, Count: 10}), []pageset.Run{{First: 15, Count: 5}, {First: 21, Count: 1}}},
		{"without, all members", without(set, pageset.Run{First: 10, Count: 5}), nil},
		{"nonzero", nonzero(data, pageset.Run{First: 50, Count: 6}), []pageset.Run{{First: 50, Count: 2}, {First: 54, Count: 1}}},
		{"nonzero to the end", nonzero(data[:2*pageset.PageBytes], pageset.Run{First: 7, Count: 2}), []pageset.Run{{First: 7, Count: 2}}},
	} {
		if diff := cmp.Diff(tt.want, slices.Collect(tt.got)); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func TestMatch(t *testing.T) {
	present := qemu.Layout{
		{Name: "pc.ram", Bytes: 1 << 20, HVA: 0x10000}, {Name: "vga.vram", Bytes: 8192, HVA: 0x200000},
		{Name: "/rom@etc/acpi/tables", Bytes: 8192, HVA: 0x300000},
	}
	blocks, differences := match([]image.BlockInfo{
		{Name: "/rom@etc/acpi/tables", Bytes: 4096}, {Name: "pc.ram", Bytes: 1 << 20}, {Name: "pc.bios", Bytes: 4096},
	}, present)
	if diff := cmp.Diff([]BlockDifference{{Name: "pc.bios", Image: 4096}, {Name: "vga.vram", Present: 8192}}, differences); diff != "" {
		t.Error(diff)
	}
	want := []block{{name: "/rom@etc/acpi/tables", layout: 2, hva: 0x300000, pages: 1, resized: true}, {name: "pc.ram", hva: 0x10000, pages: 256}, {}}
	if diff := cmp.Diff(want, blocks, cmp.AllowUnexported(block{})); diff != "" {
		t.Error(diff)
	}
	_, differences = match([]image.BlockInfo{{Name: "pc.ram", Bytes: 2 << 20}}, present[:1])
	if diff := cmp.Diff([]BlockDifference{{Name: "pc.ram", Image: 2 << 20, Present: 1 << 20}}, differences); diff != "" {
		t.Error(diff)
	}
}
