package pagetable

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Mapping is one entry of /proc/PID/smaps: a range of addresses, what backs it, and how the kernel treats it. See
// proc(5) and Documentation/filesystems/proc.rst.
type Mapping struct {
	Start, End                   uint64 // addresses, half open
	Read, Write, Execute, Shared bool
	Offset                       uint64 // bytes into the file
	DeviceMajor, DeviceMinor     uint32
	Inode                        uint64 // 0: anonymous
	Path                         string // as the kernel writes it, the first 512 bytes: may be empty, "[heap]", or end in " (deleted)"; newlines as \012

	// From smaps alone; zero in what [Maps] returns.
	KernelPageBytes uint64 // the page size of the backing: 2 MiB or 1 GiB for hugetlbfs
	MMUPageBytes    uint64
	RSSBytes        uint64
	AnonHugeBytes   uint64 // transparent huge pages of private memory
	ShmemHugeBytes  uint64 // and of shared memory
	FileHugeBytes   uint64 //
	LockedBytes     uint64
	Flags           VMFlags
}

// Bytes is the length of the mapping.
func (m Mapping) Bytes() uint64 { return m.End - m.Start }

// VMFlags are the two-letter codes of the VmFlags line, separated by blanks: Documentation/filesystems/proc.rst.
type VMFlags string

// Has reports whether the two-letter code is set.
func (f VMFlags) Has(code string) bool {
	for rest := string(f); len(rest) >= 2; {
		if rest[:2] == code {
			return true
		}
		if len(rest) < 3 {
			return false
		}
		rest = rest[3:]
	}
	return false
}

func (f VMFlags) WriteProtectRegistered() bool { return f.Has("uw") } // userfaultfd, write-protect mode
func (f VMFlags) MissingRegistered() bool      { return f.Has("um") } // userfaultfd, missing mode
func (f VMFlags) MinorRegistered() bool        { return f.Has("ui") } // userfaultfd, minor mode
func (f VMFlags) HugeTLB() bool                { return f.Has("ht") }
func (f VMFlags) Mergeable() bool              { return f.Has("mg") } // KSM may share its pages
func (f VMFlags) SoftDirty() bool              { return f.Has("sd") } // new since clear_refs: all its pages count as written
func (f VMFlags) Locked() bool                 { return f.Has("lo") }

// Mappings reads every mapping of process pid with all that smaps knows. The kernel walks the page tables for it (tens of
// milliseconds for a large process); where the ranges alone are wanted, [Maps] is cheap.
func Mappings(pid int) ([]Mapping, error) { return readMappings(pid, "smaps") }

// Maps reads every mapping of process pid without what only smaps has.
func Maps(pid int) ([]Mapping, error) { return readMappings(pid, "maps") }

func readMappings(pid int, name string) ([]Mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		return nil, fmt.Errorf("list mappings of process %d: %w", pid, err)
	}
	defer f.Close()
	mappings, err := ParseMappings(f)
	if err != nil {
		return nil, fmt.Errorf("list mappings of process %d: %w", pid, err)
	}
	return mappings, nil
}

// longestLine bounds a line of smaps: a path of PATH_MAX bytes (include/uapi/linux/limits.h), each escaped to four, and the
// fields before it.
const longestLine = 4*4096 + 256

// keptPath is how much is kept of a mapping's path, in bytes.
const keptPath = 512

// ParseMappings parses the text of /proc/PID/smaps or /proc/PID/maps.
func ParseMappings(r io.Reader) ([]Mapping, error) {
	var mappings []Mapping
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), longestLine)
	for number := 1; lines.Scan(); number++ {
		line := lines.Text()
		name, value, isField := strings.Cut(line, ":")
		// A mapping's own line begins with its range: a field's name has neither a minus sign nor a blank before the colon.
		if !isField || strings.ContainsAny(name, "- ") {
			m, err := parseMapping(line)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", number, err)
			}
			mappings = append(mappings, m)
			continue
		}
		if len(mappings) == 0 {
			return nil, fmt.Errorf("line %d: field %q belongs to no mapping", number, name)
		}
		if err := mappings[len(mappings)-1].setField(name, value); err != nil {
			return nil, fmt.Errorf("line %d: field %s: %w", number, name, err)
		}
	}
	return mappings, lines.Err()
}

// parseMapping parses "7f00-7f80 rw-p 00000000 fd:00 1234    /path with blanks".
func parseMapping(line string) (Mapping, error) {
	var fields [5]string
	rest := line
	for i := range fields {
		fields[i], rest, _ = strings.Cut(rest, " ")
	}
	from, to, ok := strings.Cut(fields[0], "-")
	major, minor, ok2 := strings.Cut(fields[3], ":")
	perms := fields[1]
	if !ok || !ok2 || len(perms) != 4 {
		return Mapping{}, fmt.Errorf("%.120q is no mapping", line)
	}
	m := Mapping{
		Read: perms[0] == 'r', Write: perms[1] == 'w', Execute: perms[2] == 'x', Shared: perms[3] == 's',
	}
	// A copy, so as not to keep the line; and no more of it than people want to see: the paths of a process that means ill may have 16 KiB
	// each, in 65,530 mappings.
	path := strings.TrimLeft(rest, " ")
	m.Path = strings.Clone(path[:min(len(path), keptPath)])
	var majorNumber, minorNumber uint64
	for _, n := range []struct {
		text string
		base int
		into *uint64
	}{{from, 16, &m.Start}, {to, 16, &m.End}, {fields[2], 16, &m.Offset}, {major, 16, &majorNumber}, {minor, 16, &minorNumber}, {fields[4], 10, &m.Inode}} {
		v, err := strconv.ParseUint(n.text, n.base, 64)
		if err != nil {
			return Mapping{}, fmt.Errorf("%.120q: %w", line, err)
		}
		*n.into = v
	}
	if m.End <= m.Start || majorNumber > 1<<32-1 || minorNumber > 1<<32-1 {
		return Mapping{}, fmt.Errorf("%.120q: numbers out of range", line)
	}
	m.DeviceMajor, m.DeviceMinor = uint32(majorNumber), uint32(minorNumber)
	return m, nil
}

// setField takes in one "Name: value" line; names unknown to it are passed over, since kernels add new ones.
func (m *Mapping) setField(name, value string) error {
	var into *uint64
	switch name {
	case "VmFlags":
		m.Flags = VMFlags(strings.TrimSpace(value))
		return nil
	case "KernelPageSize":
		into = &m.KernelPageBytes
	case "MMUPageSize":
		into = &m.MMUPageBytes
	case "Rss":
		into = &m.RSSBytes
	case "AnonHugePages":
		into = &m.AnonHugeBytes
	case "ShmemPmdMapped":
		into = &m.ShmemHugeBytes
	case "FilePmdMapped":
		into = &m.FileHugeBytes
	case "Locked":
		into = &m.LockedBytes
	default:
		return nil
	}
	number, unit, _ := strings.Cut(strings.TrimSpace(value), " ")
	kib, err := strconv.ParseUint(number, 10, 54)
	if err != nil {
		return err
	}
	if unit != "kB" {
		return errors.New("not in kB")
	}
	*into = kib * 1024
	return nil
}
