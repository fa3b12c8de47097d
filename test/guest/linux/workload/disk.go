package workload

import "encoding/binary"

// SectorBytes is the unit of the test disk's content.
const SectorBytes = 512

// Sector fills b with the content of sector number n of the test disk.
func Sector(b []byte, n uint64) {
	x := n*0x9e3779b97f4a7c15 + 1
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], x)
		x = x*0x5851f42d4c957f2d + 0x14057b7ef767814f
	}
}
