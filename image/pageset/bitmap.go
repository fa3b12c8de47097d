package pageset

import (
	"encoding/binary"
	"fmt"
)

// AddBitmap makes members of the pages from first on whose bits are set: a bit a page, in little-endian words of 64 bits, as KVM has its dirty
// log. Bits from pages on have no meaning.
func (s *Set) AddBitmap(first, pages uint64, bitmap []byte) {
	if first > s.pages || pages > s.pages-first || uint64(len(bitmap))*8 < pages {
		panic(fmt.Sprintf("pageset: bitmap of %d bytes for pages %v of %d", len(bitmap), Run{first, pages}, s.pages))
	}
	at, shift := first/64, first%64
	for left := pages; left > 0; left, at = left-min(left, 64), at+1 {
		word := binary.LittleEndian.Uint64(bitmap)
		bitmap = bitmap[8:]
		if left < 64 {
			word &= 1<<left - 1
		}
		if word == 0 {
			continue
		}
		s.words[at] |= word << shift
		if over := word >> (64 - shift); over != 0 { // a shift by 64 is 0
			s.words[at+1] |= over
		}
	}
}
