package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// RAMBlock is one piece of the machine's memory: main memory, video memory, ROMs, tables handed to the firmware. All of
// them belong to the state, the read-only ones too: they differ between two starts of the same VM.
type RAMBlock struct {
	Name          string  `json:"name"`
	Bytes         uint64  `json:"bytes"`              // used length, in whole pages of 4 KiB
	HVA           uint64  `json:"hva"`                // address in the QEMU process
	HostPageBytes uint64  `json:"hostPageBytes"`      // 4 KiB, or that of its huge pages; transparent ones do not count
	ReadOnly      bool    `json:"readOnly,omitempty"` // to the guest, where QEMU says so (≥ 8)
	Shared        bool    `json:"shared,omitempty"`   // writes reach the file: other processes could write it as well
	Backing       Backing `json:"backing"`
}

// Pages is the length in pages of 4 KiB.
func (b RAMBlock) Pages() uint64 { return b.Bytes / pageset.PageBytes }

// BackingKind says what is under a block, and with that what its unpopulated pages hold: zeros for all but BackingFile.
type BackingKind string

const (
	BackingAnonymous BackingKind = "anonymous"
	BackingShmem     BackingKind = "shmem"     // a memfd, or a file on a tmpfs
	BackingHugetlb   BackingKind = "hugetlbfs" // named or anonymous
	BackingFile      BackingKind = "file"      // on some other file system
)

// Backing is the file under a block, if there is one.
type Backing struct {
	Kind        BackingKind `json:"kind"`
	Dev         string      `json:"dev,omitempty"` // major:minor, hexadecimal, as in /proc/PID/maps
	Inode       uint64      `json:"inode,omitempty"`
	OffsetBytes uint64      `json:"offsetBytes,omitempty"` // where in the file the block begins
}

// Layout is the machine's RAM blocks, in QEMU's order: main memory first.
type Layout []RAMBlock

// Equal reports whether two layouts are of the same memory in the same places.
func (l Layout) Equal(o Layout) bool { return slices.Equal(l, o) }

// Digest is a hash of all that Equal compares, for records that outlive the process that made them.
func (l Layout) Digest() string {
	h := sha256.New()
	for _, b := range l {
		fmt.Fprintf(h, "%q %d %d %d %t %t %q %q %d %d\n", b.Name, b.Bytes, b.HVA, b.HostPageBytes, b.ReadOnly, b.Shared,
			b.Backing.Kind, b.Backing.Dev, b.Backing.Inode, b.Backing.OffsetBytes)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Bytes is the size of all blocks together.
func (l Layout) Bytes() uint64 {
	var n uint64
	for _, b := range l {
		n += b.Bytes
	}
	return n
}

// LayoutError says that a block's place is not known for sure, so that its VM cannot be captured or restored.
type LayoutError struct {
	Process string
	Block   string
	Reason  string
}

func (e *LayoutError) Error() string {
	return fmt.Sprintf("qemu %s: RAM block %q: %s", e.Process, e.Block, e.Reason)
}

// ReadLayout asks QEMU for its RAM blocks and looks each up in the process's own mappings. Every block has an address
// afterwards, and every address is backed by readable memory over the whole block; else there is an error.
func ReadLayout(ctx context.Context, m Monitor, p *Process) (Layout, error) {
	text, err := Human(ctx, m, "info ramblock")
	if err != nil {
		return nil, err
	}
	rows, hasHVA, err := parseRAMBlocks(text)
	if err != nil {
		return nil, fmt.Errorf("qemu %v: %w", p, err)
	}
	if !hasHVA {
		if err := locate(ctx, m, p, rows); err != nil {
			return nil, err
		}
	}
	maps, err := pagetable.Maps(p.PID)
	if err != nil {
		return nil, fmt.Errorf("qemu %v: %w", p, err)
	}
	var total, bound uint64
	if bound, err = memoryBound(); err != nil {
		return nil, err
	}
	for _, r := range rows {
		if total += r.usedBytes; total > bound {
			return nil, &LayoutError{p.String(), r.name, fmt.Sprintf("more than %d GiB of memory in all, more than this host could give", bound>>30)}
		}
	}
	layout := make(Layout, 0, len(rows))
	for _, r := range rows {
		b, err := place(p, maps, r)
		if err != nil {
			return nil, err
		}
		layout = append(layout, b)
	}
	if err := layout.disjoint(p); err != nil {
		return nil, err
	}
	if !p.Alive() {
		return nil, fmt.Errorf("qemu %v ended while its memory was looked up", p)
	}
	return layout, nil
}

// memoryBound is up to how much memory of a VM is believed, in bytes: four times what the host has, since hosts give out more than they have, and
// 64 GiB on any. What is kept of each page while a VM is captured must not be more than the host has because a VM says so.
func memoryBound() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("ask how much memory the host has: %w", err)
	}
	return max(4*(uint64(info.Totalram)+uint64(info.Totalswap))*uint64(info.Unit), 64<<30), nil
}

// Check compares the layout with the mappings that the process has now, without asking QEMU: for moments when it cannot
// answer. It sees a block that was unmapped or that lies on another file, not one that was added or grew.
func (l Layout) Check(p *Process) error {
	ranges := make([]pagetable.Range, len(l))
	for i, b := range l {
		ranges[i] = pagetable.Range{Start: b.HVA, End: b.HVA + b.Bytes}
	}
	maps, err := pagetable.MapsWithin(p.PID, ranges)
	if err != nil {
		return fmt.Errorf("qemu %v: %w", p, err)
	}
	for _, b := range l {
		over, reason := cover(maps, b.HVA, b.Bytes)
		switch first := over.first; {
		case reason != "":
			return &LayoutError{p.String(), b.Name, reason}
		case first.Shared != b.Shared || first.Inode != b.Backing.Inode ||
			first.Inode != 0 && (device(first) != b.Backing.Dev || over.fileOffset != b.Backing.OffsetBytes):
			return &LayoutError{p.String(), b.Name, "lies on other memory than before"}
		}
	}
	return nil
}

// place finds out what lies under one block.
func place(p *Process, maps []pagetable.Mapping, r ramBlockRow) (RAMBlock, error) {
	b := RAMBlock{Name: r.name, Bytes: roundUp(r.usedBytes), HVA: r.hva, ReadOnly: r.readOnly}
	if r.hva%pageset.PageBytes != 0 {
		return b, &LayoutError{p.String(), r.name, fmt.Sprintf("its address %#x is not that of a page", r.hva)}
	}
	over, reason := cover(maps, b.HVA, b.Bytes)
	if reason != "" {
		return b, &LayoutError{p.String(), r.name, reason}
	}
	b.Shared = over.first.Shared
	if over.first.Inode == 0 {
		b.HostPageBytes = pageset.PageBytes
		b.Backing.Kind = BackingAnonymous
		return b, nil
	}
	b.Backing.Dev, b.Backing.Inode, b.Backing.OffsetBytes = device(over.first), over.first.Inode, over.fileOffset
	// map_files leads to the file itself, deleted or in another mount namespace, whatever its path says.
	name := filepath.Join(p.dir(), "map_files", fmt.Sprintf("%x-%x", over.first.Start, over.first.End))
	var fs unix.Statfs_t
	if err := unix.Statfs(name, &fs); err != nil {
		return b, fmt.Errorf("qemu %v: RAM block %q: file system of its memory: %w", p, r.name, err)
	}
	b.HostPageBytes = pageset.PageBytes
	switch fs.Type {
	case unix.TMPFS_MAGIC:
		b.Backing.Kind = BackingShmem
	case unix.HUGETLBFS_MAGIC:
		b.Backing.Kind = BackingHugetlb
		b.HostPageBytes = uint64(fs.Bsize)
	default:
		b.Backing.Kind = BackingFile
	}
	return b, nil
}

// coverage is the run of mappings under a block. Its parts may differ in permissions to write and in flags: protecting
// a range of a block, or registering it with a userfaultfd, splits its mapping.
type coverage struct {
	first      pagetable.Mapping
	fileOffset uint64 // of the block's first byte
}

// cover finds the mappings of [hva, hva+bytes): without holes, readable, and all of the same memory. The reason says what
// is wrong, or is "".
func cover(maps []pagetable.Mapping, hva, bytes uint64) (coverage, string) {
	end := hva + bytes
	if end < hva {
		return coverage{}, fmt.Sprintf("its range at %#x wraps around", hva)
	}
	i, _ := slices.BinarySearchFunc(maps, hva, func(m pagetable.Mapping, hva uint64) int {
		if m.End <= hva {
			return -1
		}
		return 1
	})
	var c coverage
	for at := hva; at < end; at, i = maps[i].End, i+1 {
		if i >= len(maps) || maps[i].Start > at {
			return coverage{}, fmt.Sprintf("nothing is mapped at %#x", at)
		}
		m := maps[i]
		switch {
		case !m.Read:
			return coverage{}, fmt.Sprintf("its memory at %#x cannot be read", at)
		case at == hva:
			c.first = m
			c.fileOffset = m.Offset + (hva - m.Start)
		case m.Shared != c.first.Shared || m.Inode != c.first.Inode || m.Inode != 0 && device(m) != device(c.first) ||
			m.Inode != 0 && m.Offset+(at-m.Start) != c.fileOffset+(at-hva):
			return coverage{}, fmt.Sprintf("other memory begins in its middle, at %#x", at)
		}
	}
	if c.first.Inode == 0 {
		c.fileOffset = 0 // anonymous memory shows an offset of no meaning
	}
	return c, ""
}

// disjoint makes sure that no page belongs to two blocks.
func (l Layout) disjoint(p *Process) error {
	byHVA := slices.SortedFunc(slices.Values(l), func(a, b RAMBlock) int {
		if a.HVA < b.HVA {
			return -1
		}
		return 1
	})
	for i := 1; i < len(byHVA); i++ {
		if a, b := byHVA[i-1], byHVA[i]; b.HVA < a.HVA+a.Bytes {
			return &LayoutError{p.String(), b.Name, fmt.Sprintf("overlaps block %q", a.Name)}
		}
	}
	return nil
}

// device names a mapping's file system, as /proc/PID/maps does.
func device(m pagetable.Mapping) string {
	return fmt.Sprintf("%02x:%02x", m.DeviceMajor, m.DeviceMinor)
}
