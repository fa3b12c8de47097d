package dirty

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The child maps memory where it wants it, which the unix package's Mmap cannot do.

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// mapOver maps memory in the place of other memory.
func mapOver(old []byte, flags, fd int) ([]byte, error) {
	p := unsafe.Pointer(unsafe.SliceData(old))
	p, err := unix.MmapPtr(fd, 0, p, uintptr(len(old)), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(p), len(old)), nil
}

// unmap unmaps memory for good.
func unmap(b []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)))
}
