package pagetable

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Categories are what PAGEMAP_SCAN knows of a page: PAGE_IS_*, include/uapi/linux/fs.h.
type Categories uint64

const (
	CategoryWPAllowed Categories = 1 << 0 // in a mapping with asynchronous write-protect
	CategoryWritten   Categories = 1 << 1 // written since it was last protected
	CategoryFile      Categories = 1 << 2 // backed by a file
	CategoryPresent   Categories = 1 << 3
	CategorySwapped   Categories = 1 << 4
	CategoryZeroPFN   Categories = 1 << 5 // the shared zero page
	CategoryHuge      Categories = 1 << 6 // mapped by a huge page
	CategorySoftDirty Categories = 1 << 7
)

// Scan flags: PM_SCAN_*, include/uapi/linux/fs.h.
const (
	scanWPMatching   = 1 << 0 // PM_SCAN_WP_MATCHING
	scanCheckWPAsync = 1 << 1 // PM_SCAN_CHECK_WPASYNC
)

// ioctlPagemapScan is PAGEMAP_SCAN, include/uapi/linux/fs.h: _IOWR('f', 16, struct pm_scan_arg).
const ioctlPagemapScan = 0xc0606610

// scanArg is struct pm_scan_arg, include/uapi/linux/fs.h.
type scanArg struct {
	size              uint64
	flags             uint64
	start, end        uint64
	walkEnd           uint64 // out: where the walk stopped
	vec               uint64
	vecLen            uint64
	maxPages          uint64
	categoryInverted  uint64
	categoryMask      uint64
	categoryAnyOfMask uint64
	returnMask        uint64
}

// region is struct page_region, include/uapi/linux/fs.h.
type region struct{ start, end, categories uint64 }

// regionsAtOnce is how many regions one ioctl returns: 96 KiB of buffer. The kernel walks on from where it stopped at no
// cost worth counting, so a larger one only costs memory.
const regionsAtOnce = 4096

// ScanArgs says which pages a scan looks for. A page matches when all categories of CategoryMask are present in it and,
// unless CategoryAnyOf is zero, at least one of those; both after the categories of CategoryInverted were flipped.
type ScanArgs struct {
	Start, End uint64 // page-aligned addresses

	// WriteProtect protects the matching pages in the same step that reports them. It destroys what it read: the caller
	// answers for every page reported. The kernel notifies secondary page tables (KVM's) for the whole range walked.
	WriteProtect bool
	// CheckAsync makes the scan fail with ErrNotTracked where memory is not under asynchronous write-protect, in place of
	// passing it over.
	CheckAsync bool

	CategoryMask, CategoryAnyOf, CategoryInverted Categories
	ReturnMask                                    Categories // what Region.Categories shows; neighbours that agree in these are one region
}

// Region is a range of neighbouring pages with the same categories.
type Region struct {
	Start, End uint64 // addresses
	Categories Categories
}

// Scan calls visit for every range of matching pages in [Start, End), in ascending order; neighbouring calls may touch.
// It stops at the first error of visit. After any error of a scan with WriteProtect, pages may have been protected that
// were never reported.
func (p *Pagemap) Scan(args ScanArgs, visit func(Region) error) error {
	regions, _ := p.regions.Get().(*[regionsAtOnce]region)
	if regions == nil {
		regions = new([regionsAtOnce]region)
	}
	defer p.regions.Put(regions)
	arg := scanArg{
		size:              uint64(unsafe.Sizeof(scanArg{})),
		end:               args.End,
		vec:               uint64(uintptr(unsafe.Pointer(regions))), // the heap does not move, and regions is used to the end
		vecLen:            regionsAtOnce,
		categoryInverted:  uint64(args.CategoryInverted),
		categoryMask:      uint64(args.CategoryMask),
		categoryAnyOfMask: uint64(args.CategoryAnyOf),
		returnMask:        uint64(args.ReturnMask),
	}
	if args.WriteProtect {
		arg.flags |= scanWPMatching
	}
	if args.CheckAsync {
		arg.flags |= scanCheckWPAsync
	}
	for at := args.Start; at < args.End; at = arg.walkEnd {
		arg.start, arg.walkEnd = at, 0
		n, err := p.scanOnce(&arg)
		if err != nil {
			return fmt.Errorf("scan page tables of process %d in [%#x,%#x): %w", p.pid, at, args.End, err)
		}
		for _, r := range regions[:n] {
			if err := visit(Region{Start: r.start, End: r.end, Categories: Categories(r.categories)}); err != nil {
				return err
			}
		}
		if arg.walkEnd <= at {
			return fmt.Errorf("scan page tables of process %d in [%#x,%#x): the kernel made no progress", p.pid, at, args.End)
		}
	}
	return nil
}

func (p *Pagemap) scanOnce(arg *scanArg) (regions int, err error) {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n uintptr
	var errno unix.Errno
	if err := conn.Control(func(fd uintptr) {
		n, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, ioctlPagemapScan, uintptr(unsafe.Pointer(arg)))
	}); err != nil {
		return 0, err
	}
	switch {
	case errno == 0:
		return int(n), nil
	case errno == unix.EPERM:
		return 0, fmt.Errorf("%w: %w", ErrNotTracked, errno)
	case errors.Is(errno, unix.ENOTTY):
		return 0, fmt.Errorf("PAGEMAP_SCAN: %w: %w", ErrUnsupported, errno)
	}
	return 0, errno
}
