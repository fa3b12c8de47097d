package dirty

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Process names a QEMU process. A pid alone is used again; with its start time it is not.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks since boot (proc(5), stat, field 22)
}

// String names the process for people, to whom its start time says nothing.
func (p Process) String() string {
	return fmt.Sprintf("pid %d", p.PID)
}

// Block is one RAM block of the process.
type Block struct {
	Name  string `json:"name"`
	HVA   uint64 `json:"hva"`   // address in the process, page aligned
	Bytes uint64 `json:"bytes"` // used length, a multiple of pageset.PageBytes

	// HostPageBytes is the size of the pages that back the block: 4096, or that of its huge pages.
	HostPageBytes uint64 `json:"hostPageBytes"`

	// Discards says that something in QEMU may punch holes into the block while the guest runs: a balloon that
	// inflates, free page reporting. On shared memory that makes page-table tracking impossible, see [PageTables]; what is guarded is kept
	// from it, see [Session.HoldOff].
	Discards bool `json:"discards"`
}

// Pages returns how many pages the block has.
func (b Block) Pages() uint64 { return b.Bytes / pageset.PageBytes }

// End returns the first address behind the block.
func (b Block) End() uint64 { return b.HVA + b.Bytes }

func (b Block) check() error {
	switch {
	case b.Bytes == 0 || b.Bytes%pageset.PageBytes != 0 || b.HVA%pageset.PageBytes != 0:
		return fmt.Errorf("block %s: %#x bytes at %#x is not a run of whole pages", b.Name, b.Bytes, b.HVA)
	case b.HVA > ^uint64(0)-b.Bytes:
		return fmt.Errorf("block %s: %#x bytes at %#x end outside the address space", b.Name, b.Bytes, b.HVA)
	case b.HostPageBytes < pageset.PageBytes || b.HostPageBytes&(b.HostPageBytes-1) != 0:
		return fmt.Errorf("block %s: host page size %d", b.Name, b.HostPageBytes)
	}
	return nil
}

// run gives the pages of the block that the addresses [start, end) lie in. It panics on addresses outside the block,
// since they would be some other memory's pages.
func (b Block) run(start, end uint64) pageset.Run {
	if start < b.HVA || end > b.End() || start > end || (start-b.HVA)%pageset.PageBytes != 0 || end%pageset.PageBytes != 0 {
		panic(fmt.Sprintf("dirty: addresses [%#x,%#x) in block %s [%#x,%#x)", start, end, b.Name, b.HVA, b.End()))
	}
	return pageset.Run{First: (start - b.HVA) / pageset.PageBytes, Count: (end - start) / pageset.PageBytes}
}

// LayoutDigest names a memory layout: two processes' layouts, or one's at two times, with the same digest have the
// same blocks at the same addresses.
func LayoutDigest(blocks []Block) string {
	text, err := json.Marshal(blocks)
	if err != nil {
		panic(err) // strings and numbers always marshal
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
