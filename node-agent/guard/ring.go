package guard

import (
	"sync/atomic"
	"unsafe"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// A ring carries pages from the keeper, which copies them as the guest is about to write them, to the worker. It lies in memory that both
// share: the keeper, for which a guest waits, neither does file I/O nor waits for a process that does, but for room in the ring.
//
// One side writes, the other reads. head and tail count pages since the beginning and only grow: slot n%ringSlots holds page n, and is the
// writer's from the moment that tail is beyond n-ringSlots until head is beyond n.
type ring struct {
	shared *ringMemory
}

const (
	ringBytes = 32 << 20
	ringSlots = ringBytes / pageset.PageBytes
)

// ringMemory is how the shared memory looks. head and tail are lines of their own in the processors' caches.
type ringMemory struct {
	head atomic.Uint64 // pages put in
	_    [56]byte
	tail atomic.Uint64 // pages taken out
	_    [56]byte
	// Where the pages are from, and in a place that is a page's own, what they hold.
	address [ringSlots]uint64
	page    [ringSlots][pageset.PageBytes]byte
}

const ringMemoryBytes = int(unsafe.Sizeof(ringMemory{}))

// ringIn returns the ring in a shared mapping, whose fresh memory is an empty one.
func ringIn(memory []byte) ring {
	if len(memory) < ringMemoryBytes {
		panic("guard: the ring's memory is too short")
	}
	return ring{(*ringMemory)(unsafe.Pointer(unsafe.SliceData(memory)))}
}

// room returns where the next page goes; nil where there is no room. It becomes visible by put.
func (r ring) room() []byte {
	head := r.shared.head.Load()
	if head-r.shared.tail.Load() >= ringSlots {
		return nil
	}
	return r.shared.page[head%ringSlots][:]
}

// put makes the page visible that was written where room said.
func (r ring) put(address uint64) {
	head := r.shared.head.Load()
	r.shared.address[head%ringSlots] = address
	r.shared.head.Store(head + 1)
}

// filled is how many pages are waiting.
func (r ring) filled() uint64 {
	// The other side is not trusted to keep to the rule: more than there are slots is none.
	return min(r.shared.head.Load()-r.shared.tail.Load(), ringSlots)
}

// look returns the page that has waited longest but i; the slots are the writer's again by drop.
func (r ring) look(i int) (address uint64, page []byte) {
	slot := (r.shared.tail.Load() + uint64(i)) % ringSlots
	return r.shared.address[slot], r.shared.page[slot][:]
}

// drop takes out the n pages that have waited longest.
func (r ring) drop(n int) { r.shared.tail.Add(uint64(n)) }
