package qemu

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// GuestRange is a range of the guest's physical memory that KVM maps as one, and that the guest can write.
type GuestRange struct {
	Space       uint32 // KVM's address space: 0, or 1 for system management mode
	GPA, Bytes  uint64
	Block       int // in the layout
	OffsetBytes uint64
}

// GuestRanges asks which ranges of main memory KVM has mapped, at this moment. Under another accelerator there are none. Devices' memory is left
// out, that of screens above all: QEMU itself keeps KVM's log of what is written there.
func GuestRanges(ctx context.Context, m Monitor, layout Layout) ([]GuestRange, error) {
	text, err := Human(ctx, m, "info mtree -f")
	if err != nil {
		return nil, err
	}
	return parseFlatViews(text, layout)
}

// KVM's address spaces by QEMU's names for them (accel/kvm/kvm-all.c and target/i386/kvm/kvm.c, register_smram_listener).
var kvmSpaces = map[string]uint32{"memory": 0, "KVM-SMRAM": 1}

var (
	flatViewSpace = regexp.MustCompile(`^ AS "(.*?)", root: `)
	flatRange     = regexp.MustCompile(`^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (.*?)(?: @([0-9a-f]{16}))? KVM\s*$`)
)

// parseFlatViews reads what `info mtree -f` prints (QEMU, system/memory.c, mtree_print_flatview).
func parseFlatViews(text string, layout Layout) ([]GuestRange, error) {
	blocks := map[string]int{}
	for i, b := range layout {
		// A device's block has the device's path before its name, which a range does not have.
		if !b.ReadOnly && !strings.HasSuffix(b.Name, ".vram") {
			blocks[b.Name] = i
		}
	}
	var ranges []GuestRange
	var spaces []uint32 // of the view that is read
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasPrefix(line, "FlatView #") {
			spaces = nil
			continue
		}
		if f := flatViewSpace.FindStringSubmatch(line); f != nil {
			if space, ok := kvmSpaces[f[1]]; ok {
				spaces = append(spaces, space)
			}
			continue
		}
		f := flatRange.FindStringSubmatch(line)
		if f == nil || len(spaces) == 0 {
			continue
		}
		block, ok := blocks[f[3]]
		if !ok {
			continue
		}
		first, _ := strconv.ParseUint(f[1], 16, 64) // 16 hex digits fit
		last, _ := strconv.ParseUint(f[2], 16, 64)
		offset := uint64(0)
		if f[4] != "" {
			offset, _ = strconv.ParseUint(f[4], 16, 64)
		}
		r := GuestRange{GPA: first, Bytes: last - first + 1, Block: block, OffsetBytes: offset}
		size := layout[block].Bytes
		if last < first || r.Bytes > size || offset > size-r.Bytes {
			return nil, fmt.Errorf("memory map has a range of block %q that is not in it: %.120q", f[3], line)
		}
		if first%pageset.PageBytes != 0 || r.Bytes%pageset.PageBytes != 0 || offset%pageset.PageBytes != 0 {
			continue // KVM maps whole pages
		}
		for _, space := range spaces {
			r.Space = space
			ranges = append(ranges, r)
		}
	}
	return ranges, nil
}
