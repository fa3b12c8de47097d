package pagetable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Features are bits of struct uffdio_api, include/uapi/linux/userfaultfd.h (UFFD_FEATURE_*).
type Features uint64

const (
	FeaturePagefaultFlagWP   Features = 1 << 0  // write-protect mode
	FeatureEventFork         Features = 1 << 1  // needs CAP_SYS_PTRACE
	FeatureEventRemap        Features = 1 << 2  //
	FeatureEventRemove       Features = 1 << 3  // MADV_DONTNEED and MADV_REMOVE are reported
	FeatureMissingHugetlbfs  Features = 1 << 4  //
	FeatureMissingShmem      Features = 1 << 5  //
	FeatureEventUnmap        Features = 1 << 6  //
	FeatureThreadID          Features = 1 << 8  // the faulting thread is named
	FeatureExactAddress      Features = 1 << 11 // fault addresses are not rounded to pages
	FeatureWPHugetlbfsShmem  Features = 1 << 12 // write-protect on shared memory and hugetlbfs
	FeatureWPUnpopulated     Features = 1 << 13 // holes can be protected (costs huge pages later)
	FeatureWPAsync           Features = 1 << 15 // faults are resolved by the kernel: dirty tracking, Linux 6.7; implies FeatureWPUnpopulated
	FeaturesAsyncWriteTracks          = FeaturePagefaultFlagWP | FeatureWPHugetlbfsShmem | FeatureWPAsync
	FeaturesGuard                     = FeaturePagefaultFlagWP | FeatureWPHugetlbfsShmem // writers wait until somebody lets them go on
)

// Mode says what a range is registered for: UFFDIO_REGISTER_MODE_*, include/uapi/linux/userfaultfd.h.
type Mode uint64

const (
	ModeMissing      Mode = 1 << 0
	ModeWriteProtect Mode = 1 << 1
	ModeMinor        Mode = 1 << 2
)

// From include/uapi/linux/userfaultfd.h.
const (
	uffdAPI = 0xAA // UFFD_API

	ioctlUffdAPI          = 0xc018aa3f // UFFDIO_API: _IOWR(0xAA, 0x3F, struct uffdio_api)
	ioctlUffdRegister     = 0xc020aa00 // UFFDIO_REGISTER: _IOWR(0xAA, 0x00, struct uffdio_register)
	ioctlUffdUnregister   = 0x8010aa01 // UFFDIO_UNREGISTER: _IOR(0xAA, 0x01, struct uffdio_range)
	ioctlUffdWriteProtect = 0xc018aa06 // UFFDIO_WRITEPROTECT: _IOWR(0xAA, 0x06, struct uffdio_writeprotect)

	uffdWriteProtectModeWP = 1 << 0 // UFFDIO_WRITEPROTECT_MODE_WP
)

type uffdRange struct{ start, length uint64 }          // struct uffdio_range
type uffdAPIArg struct{ api, features, ioctls uint64 } // struct uffdio_api
type uffdRegisterArg struct {                          // struct uffdio_register
	uffdRange
	mode, ioctls uint64
}
type uffdWriteProtectArg struct { // struct uffdio_writeprotect
	uffdRange
	mode uint64
}

// Userfaultfd is a userfaultfd that was created inside a process and acts on that process's memory, whoever holds it.
type Userfaultfd struct{ *os.File }

// API agrees on the features and returns all that the kernel offers. It has to be the first call on a new userfaultfd and
// can be made once; [ErrUnsupported] where the kernel lacks one of the features.
func (u Userfaultfd) API(features Features) (offered Features, err error) {
	arg := uffdAPIArg{api: uffdAPI, features: uint64(features)}
	switch err := ioctl(u.File, ioctlUffdAPI, unsafe.Pointer(&arg)); {
	case errors.Is(err, unix.EINVAL):
		return 0, fmt.Errorf("userfaultfd: agree on features %#x (offered %#x): %w: %w", features, arg.features, ErrUnsupported, err)
	case err != nil:
		return 0, fmt.Errorf("userfaultfd: agree on features %#x: %w", features, err)
	}
	return Features(arg.features), nil
}

// Register puts [start, start+length) under this userfaultfd. To register a range again with the same userfaultfd changes
// nothing; [ErrOwned] where it is registered with another one.
func (u Userfaultfd) Register(start, length uint64, mode Mode) error {
	arg := uffdRegisterArg{uffdRange: uffdRange{start, length}, mode: uint64(mode)}
	err := ioctl(u.File, ioctlUffdRegister, unsafe.Pointer(&arg))
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", ErrOwned, err)
	}
	return rangeError("register", start, length, err)
}

// Unregister takes [start, start+length) out again and lifts every protection from it.
func (u Userfaultfd) Unregister(start, length uint64) error {
	arg := uffdRange{start, length}
	return rangeError("unregister", start, length, ioctl(u.File, ioctlUffdUnregister, unsafe.Pointer(&arg)))
}

// WriteProtect puts write protection onto the pages of [start, start+length), or lifts it and wakes who waits for it. With
// FeatureWPUnpopulated, which FeatureWPAsync brings along, holes are protected too: an armed hole reads as swapped in the
// pagemap, and costs huge pages later. A protecting [Pagemap.Scan] can leave them out.
func (u Userfaultfd) WriteProtect(start, length uint64, on bool) error {
	arg := uffdWriteProtectArg{uffdRange: uffdRange{start, length}}
	what := "lift write protection from"
	if on {
		arg.mode = uffdWriteProtectModeWP
		what = "write-protect"
	}
	return rangeError(what, start, length, ioctl(u.File, ioctlUffdWriteProtect, unsafe.Pointer(&arg)))
}

func rangeError(what string, start, length uint64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("userfaultfd: %s [%#x,%#x): %w", what, start, start+length, err)
}

// ioctl goes through the file's raw connection: (*os.File).Fd would switch the open file description, which the other
// process shares, to blocking mode.
func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	if err := conn.Control(func(fd uintptr) {
		for {
			if _, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg)); errno != unix.EINTR {
				return
			}
		}
	}); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// Fault is one that a thread waits in until somebody answers it.
type Fault struct {
	Address      uint64 // of the page
	WriteProtect bool   // on a write to a protected page; else on a missing or a minor one
}

// From include/uapi/linux/userfaultfd.h.
const (
	messageBytes    = 32     // struct uffd_msg
	eventPagefault  = 0x12   // UFFD_EVENT_PAGEFAULT
	pagefaultFlagWP = 1 << 1 // UFFD_PAGEFAULT_FLAG_WP
)

// FaultBuffer is what [Userfaultfd.Faults] reads into.
type FaultBuffer struct {
	raw    [64 * messageBytes]byte
	faults [64]Fault
}

// Faults returns the faults that nobody has read yet, up to 64, valid until the next call with the same buffer; none where there are none. The
// file has to be non-blocking.
func (u Userfaultfd) Faults(buf *FaultBuffer) ([]Fault, error) {
	conn, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	var n int
	var readErr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if n, readErr = unix.Read(int(fd), buf.raw[:]); readErr != unix.EINTR {
				return
			}
		}
	}); err != nil {
		return nil, err
	}
	switch {
	case readErr == unix.EAGAIN:
		return nil, nil
	case readErr != nil:
		return nil, fmt.Errorf("userfaultfd: read faults: %w", readErr)
	case n%messageBytes != 0:
		return nil, fmt.Errorf("userfaultfd: read faults: %d bytes, which is no whole number of messages", n)
	}
	faults := buf.faults[:n/messageBytes]
	for i := range faults {
		m := buf.raw[i*messageBytes:][:messageBytes]
		if m[0] != eventPagefault {
			return nil, fmt.Errorf("userfaultfd: an event of kind %#x, which was not asked for", m[0])
		}
		faults[i] = Fault{
			WriteProtect: binary.NativeEndian.Uint64(m[8:])&pagefaultFlagWP != 0,
			Address:      binary.NativeEndian.Uint64(m[16:]),
		}
	}
	return faults, nil
}
