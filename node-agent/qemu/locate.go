package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// QEMU before 8 does not print the host addresses of its RAM blocks, and its gpa2hva answers only for what is mapped in
// the guest at that moment: never for a table that waits in fw_cfg, for a ROM whose BAR is off, or for video memory
// before the firmware ran. So the addresses are read from where QEMU keeps them: its list of RAMBlock structures.
//
// What makes that sound is that `info ramblock` prints the same list in the same order. A structure is taken for the
// first of the list only if name, offset, used and total length are those of the first row, and the chain of its
// pointers must then give every further row with all its values, and end. gpa2hva must agree about a block that is
// mapped. Two chains that both fit, or none, and the VM is refused.

// ramBlockStruct has the offsets in struct RAMBlock (QEMU, include/exec/ramblock.h, include/exec/ram_addr.h before 7.0):
//
//	struct rcu_head rcu; MemoryRegion *mr; uint8_t *host; uint8_t *colo_cache; ram_addr_t offset, used_length,
//	max_length; void (*resized)(...); uint32_t flags; char idstr[256]; QLIST_ENTRY(RAMBlock) next;
//
// It has been so, for 64-bit hosts, from QEMU 3.0 to 10.0.
const (
	ramBlockHost   = 24
	ramBlockOffset = 40
	ramBlockUsed   = 48
	ramBlockTotal  = 56
	ramBlockIDStr  = 76
	ramBlockNext   = 336
	ramBlockBytes  = 344 // as far as it is read

	ramBlockIDStrBytes = 256
)

// maxScanBytes bounds how much of QEMU's private memory is searched for the list; its heap is a few to some tens of
// megabytes.
const maxScanBytes = 1 << 30

// locate fills in the host addresses of rows.
func locate(ctx context.Context, m Monitor, p *Process, rows []ramBlockRow) error {
	mem, err := os.Open(filepath.Join(p.dir(), "mem"))
	if err != nil {
		return fmt.Errorf("qemu %v: %w", p, err)
	}
	defer mem.Close()
	maps, err := pagetable.Maps(p.PID)
	if err != nil {
		return fmt.Errorf("qemu %v: %w", p, err)
	}
	// The list is made by the main thread, whose allocations are in the heap but for very large ones. Only where it is not
	// there the rest is searched.
	heap, rest := searchable(maps, rows[0].totalBytes)
	found, err := findChains(ctx, mem, heap, rows)
	if err == nil && len(found) == 0 {
		found, err = findChains(ctx, mem, rest, rows)
	}
	if err != nil {
		return fmt.Errorf("qemu %v: look for the list of RAM blocks: %w", p, err)
	}
	if len(found) != 1 {
		return &LayoutError{p.String(), rows[0].name,
			fmt.Sprintf("this QEMU does not print host addresses, and its list of RAM blocks was found %d times in its memory", len(found))}
	}
	for i := range rows {
		rows[i].hva = found[0][i]
	}
	return agree(ctx, m, p, rows)
}

// searchable picks the mappings in which the list could be: writable, private, anonymous. Guest memory is left out by its
// size, and the code that TCG translates by being executable.
func searchable(maps []pagetable.Mapping, largest uint64) (heap, rest []pagetable.Mapping) {
	for _, m := range maps {
		switch {
		case m.Inode != 0 || !m.Read || !m.Write || m.Shared || m.Execute:
		case m.Path == "[heap]":
			heap = append(heap, m)
		case m.Bytes() < largest:
			rest = append(rest, m)
		}
	}
	return heap, rest
}

// findChains searches the mappings for the structure of the first row and follows each that it finds.
func findChains(ctx context.Context, mem io.ReaderAt, maps []pagetable.Mapping, rows []ramBlockRow) ([][]uint64, error) {
	needle := append([]byte(rows[0].name), 0)
	const chunk = 1 << 20
	buf := make([]byte, chunk+ramBlockBytes)
	var found [][]uint64
	var scanned uint64
	for _, mp := range maps {
		if scanned += mp.Bytes(); scanned > maxScanBytes {
			return nil, fmt.Errorf("more than %d bytes of private memory to search", maxScanBytes)
		}
		for at := mp.Start; at < mp.End; at += chunk {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			// Each piece reaches into the next by a structure's length, so that none is cut in two.
			b := buf[:min(uint64(len(buf)), mp.End-at)]
			if _, err := mem.ReadAt(b, int64(at)); err != nil {
				break // unmapped meanwhile: not where the list is
			}
			for i := 0; ; i++ {
				n := bytes.Index(b[i:], needle)
				if n < 0 {
					break
				}
				i += n
				if s := i - ramBlockIDStr; s >= 0 && s < chunk && s+ramBlockBytes <= len(b) {
					if hvas := followChain(mem, at+uint64(s), rows); hvas != nil {
						found = append(found, hvas)
					}
				}
			}
		}
	}
	return found, nil
}

// followChain reads the list from its first structure on. It returns the host addresses, or nil where anything differs
// from rows.
func followChain(mem io.ReaderAt, addr uint64, rows []ramBlockRow) []uint64 {
	var hvas []uint64
	var s [ramBlockBytes]byte
	for _, r := range rows {
		if addr == 0 || addr > 1<<63 {
			return nil
		}
		if _, err := mem.ReadAt(s[:], int64(addr)); err != nil {
			return nil
		}
		word := func(offset int) uint64 { return binary.LittleEndian.Uint64(s[offset:]) }
		idstr, _, terminated := bytes.Cut(s[ramBlockIDStr:ramBlockIDStr+ramBlockIDStrBytes], []byte{0})
		if !terminated || string(idstr) != r.name || word(ramBlockOffset) != r.offset ||
			word(ramBlockUsed) != r.usedBytes || word(ramBlockTotal) != r.totalBytes {
			return nil
		}
		hvas = append(hvas, word(ramBlockHost))
		addr = word(ramBlockNext)
	}
	if addr != 0 { // more blocks than rows
		return nil
	}
	return hvas
}

var gpa2hvaAnswer = regexp.MustCompile(`^Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]{1,16})\s*$`)

// ramAddresses are guest-physical addresses of which one at least is main memory on every machine: 0 on PCs, 1 GiB on
// the Arm virt machine.
var ramAddresses = []uint64{0, 1 << 30}

// agree asks QEMU for the host address of a piece of memory that is mapped in the guest, and compares.
func agree(ctx context.Context, m Monitor, p *Process, rows []ramBlockRow) error {
	for _, gpa := range ramAddresses {
		text, err := Human(ctx, m, fmt.Sprintf("gpa2hva %#x", gpa))
		if err != nil {
			return err
		}
		f := gpa2hvaAnswer.FindStringSubmatch(strings.TrimSpace(text))
		if f == nil {
			continue // nothing there
		}
		hva, err := strconv.ParseUint(f[2], 16, 64)
		if err != nil {
			return fmt.Errorf("qemu %v: gpa2hva: %w", p, err)
		}
		for _, r := range rows {
			// The answer has the memory region's name; a device's block has the device's path before it.
			if (r.name == f[1] || strings.HasSuffix(r.name, "/"+f[1])) && hva >= r.hva && hva-r.hva < r.totalBytes {
				return nil
			}
		}
		return &LayoutError{p.String(), f[1], fmt.Sprintf("gpa2hva has it at %#x, where the list of RAM blocks has none such", hva)}
	}
	return &LayoutError{p.String(), rows[0].name, "gpa2hva knows no main memory, so the addresses cannot be confirmed"}
}
