package qemu

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// ramBlockRow is a row of `info ramblock` (QEMU, system/physmem.c, ram_block_format).
type ramBlockRow struct {
	name       string
	offset     uint64 // in QEMU's ram_addr_t space
	usedBytes  uint64 // what the guest sees now; less than total for resizeable blocks
	totalBytes uint64
	hva        uint64 // 0 where this QEMU does not say
	readOnly   bool
}

// maxRAMBlocks bounds what is believed of a list of RAM blocks. A machine has some ten, and a few per device.
const maxRAMBlocks = 4096

var (
	ramBlockHeader = regexp.MustCompile(`^\s*Block Name\s+PSize\s+Offset\s+Used\s+Total(\s+HVA\s+RO)?\s*$`)
	ramBlockLine   = regexp.MustCompile(`^\s*(.*?)\s+\d+ (?:B|[KMGTPE]iB)\s+0x([0-9a-f]{16}) 0x([0-9a-f]{16}) 0x([0-9a-f]{16})(?: +0x([0-9a-f]{16})\s+(ro|rw))?\s*$`)
)

// parseRAMBlocks reads what `info ramblock` prints. hasHVA tells whether it gives host addresses (QEMU ≥ 8).
func parseRAMBlocks(text string) (rows []ramBlockRow, hasHVA bool, err error) {
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(text, "\r\n", "\n"), "\n"), "\n")
	head := ramBlockHeader.FindStringSubmatch(lines[0])
	if head == nil {
		return nil, false, fmt.Errorf("list of RAM blocks begins with %.80q", lines[0])
	}
	if len(lines) > maxRAMBlocks {
		return nil, false, fmt.Errorf("%d RAM blocks; at most %d are believed", len(lines)-1, maxRAMBlocks)
	}
	hasHVA = head[1] != ""
	seen := make(map[string]bool)
	for _, line := range lines[1:] {
		f := ramBlockLine.FindStringSubmatch(line)
		if f == nil || hasHVA != (f[5] != "") {
			return nil, false, fmt.Errorf("RAM block in an unknown form: %.120q", line)
		}
		r := ramBlockRow{name: f[1], readOnly: f[6] == "ro"}
		for i, v := range []*uint64{&r.offset, &r.usedBytes, &r.totalBytes} {
			*v, _ = strconv.ParseUint(f[2+i], 16, 64) // 16 hex digits fit
		}
		if hasHVA {
			r.hva, _ = strconv.ParseUint(f[5], 16, 64)
		}
		switch {
		case r.name == "":
			// A memory backend that nothing uses yet has no name: nothing could find it again in a restore.
			return nil, false, fmt.Errorf("a RAM block of %d bytes has no name", r.totalBytes)
		case seen[r.name]:
			return nil, false, fmt.Errorf("two RAM blocks named %.80q", r.name)
		case r.usedBytes == 0 || r.usedBytes > r.totalBytes || r.totalBytes > 1<<52:
			return nil, false, fmt.Errorf("RAM block %.80q: %#x bytes used of %#x", r.name, r.usedBytes, r.totalBytes)
		}
		seen[r.name] = true
		rows = append(rows, r)
	}
	if len(rows) == 0 {
		return nil, false, fmt.Errorf("no RAM blocks")
	}
	return rows, hasHVA, nil
}

// roundUp is bytes in whole pages.
func roundUp(bytes uint64) uint64 {
	return (bytes + pageset.PageBytes - 1) &^ (pageset.PageBytes - 1)
}
