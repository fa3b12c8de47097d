package workload

import (
	"encoding/binary"
	"fmt"
)

// Counter is the guest's count and the buffer that belongs to it. The buffer is divided into groups of pages; count n
// rewrites group n modulo the number of groups. So what each page holds follows from the count alone, and so does the
// buffer's hash.
type Counter struct {
	Pages      uint64 // of the buffer: a multiple of GroupPages
	GroupPages uint64 // rewritten by each count
	Seed       uint64
}

// PageBytes is the size of a page of the buffer.
const PageBytes = 4096

const (
	multiplier = 0x5851f42d4c957f2d // Knuth's MMIX generator
	increment  = 0x14057b7ef767814f
	fnvPrime   = 0x100000001b3
	fnvOffset  = 0xcbf29ce484222325
)

// written returns the last count, up to and including count, that wrote page. Count 0 wrote all of them.
func (c Counter) written(page, count uint64) uint64 {
	groups := c.Pages / c.GroupPages
	group := page / c.GroupPages
	since := (count%groups + groups - group) % groups
	if since > count {
		return 0
	}
	return count - since
}

// start is the first word of a page as count left it.
func (c Counter) start(page, count uint64) uint64 {
	x := (c.Seed ^ page*0x9e3779b97f4a7c15) + count*0xd1342543de82ef95
	x ^= x >> 32
	return x*multiplier + increment
}

// Fill writes the whole buffer as it is at count 0.
func (c Counter) Fill(buffer []byte) {
	for page := range c.Pages {
		c.fillPage(buffer, page, 0)
	}
}

// Step writes what count changes in the buffer, which must be as the count before left it.
func (c Counter) Step(buffer []byte, count uint64) {
	first := count % (c.Pages / c.GroupPages) * c.GroupPages
	for page := first; page < first+c.GroupPages; page++ {
		c.fillPage(buffer, page, count)
	}
}

func (c Counter) fillPage(buffer []byte, page, count uint64) {
	b := buffer[page*PageBytes:][:PageBytes]
	x := c.start(page, count)
	for i := 0; i < PageBytes; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], x)
		x = x*multiplier + increment
	}
}

// CorruptError says where the buffer is not what it must be.
type CorruptError struct {
	Count uint64
	Page  uint64
	Off   int // of the first wrong word in the page
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("at count %d page %d of the buffer is wrong at offset %d", e.Count, e.Page, e.Off)
}

// Check reads the whole buffer, compares it with what it must be at count, and returns the hash of what it read. The error
// is a *CorruptError.
func (c Counter) Check(buffer []byte, count uint64) (hash uint64, err error) {
	for page := range c.Pages {
		b := buffer[page*PageBytes:][:PageBytes]
		x := c.start(page, c.written(page, count))
		h := uint64(fnvOffset)
		for i := 0; i < PageBytes; i += 8 {
			word := binary.LittleEndian.Uint64(b[i:])
			if word != x && err == nil {
				err = &CorruptError{Count: count, Page: page, Off: i}
			}
			h = (h ^ word) * fnvPrime
			x = x*multiplier + increment
		}
		hash = hash*31 + h
	}
	return hash, err
}

// Hash returns the hash that the buffer must have at count, without a buffer.
func (c Counter) Hash(count uint64) uint64 {
	var hash uint64
	for page := range c.Pages {
		x := c.start(page, c.written(page, count))
		h := uint64(fnvOffset)
		for range PageBytes / 8 {
			h = (h ^ x) * fnvPrime
			x = x*multiplier + increment
		}
		hash = hash*31 + h
	}
	return hash
}
