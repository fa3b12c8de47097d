package devstate

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// MaxBytes bounds a stream. Usual ones have 170 to 400 KB.
const MaxBytes = 64 << 20

// Values of the stream's first bytes and of what each part begins with (QEMU, migration/savevm.h and qemu-file-types.h).
const (
	fileMagic   = 0x5145564d // "QEVM"
	fileVersion = 3

	typeEOF           = 0x00
	typeSectionFull   = 0x04
	typeVMDescription = 0x06
	typeConfiguration = 0x07
	typeSectionFooter = 0x7e

	headerBytes = 8 // magic and version
	footerBytes = 5 // type and section id
)

// Section is the state of one device. Name, Instance and Version tell the loading QEMU which device takes it.
type Section struct {
	ID       uint32 // counts registrations in the process that saved; another QEMU may number otherwise
	Name     string
	Instance uint32
	Version  uint32

	Offset, Bytes int // of the device's state in the stream
}

func (s Section) String() string {
	return fmt.Sprintf("%s instance %d version %d", s.Name, s.Instance, s.Version)
}

// Stream is what a stream holds.
type Stream struct {
	Machine     string // canonical machine type of the configuration; "" where there is none
	Sections    []Section
	Description []byte // JSON; nil where there is none
}

// FormatError says where a stream is not what it should be.
type FormatError struct {
	Offset int
	What   string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("device state at byte %d: %s", e.Offset, e.What)
}

// Parse reads a whole stream, with or without configuration and description.
func Parse(stream []byte) (*Stream, error) {
	if len(stream) > MaxBytes {
		return nil, &FormatError{MaxBytes, fmt.Sprintf("%d bytes are more than is believed", len(stream))}
	}
	if len(stream) < headerBytes || binary.BigEndian.Uint32(stream) != fileMagic || binary.BigEndian.Uint32(stream[4:]) != fileVersion {
		return nil, &FormatError{0, "not a device state of version 3"}
	}
	s := new(Stream)
	at := headerBytes
	if at < len(stream) && stream[at] == typeConfiguration {
		name, ok := counted(stream[at+1:])
		if !ok || len(name) == 0 || len(name) > 255 || !printable(name) {
			return nil, &FormatError{at, "bad configuration section"}
		}
		s.Machine = string(name)
		at += 5 + len(name)
	}
	var err error
	if s.Sections, at, err = parseSections(stream, at); err != nil {
		return nil, err
	}
	if rest := stream[at+1:]; len(rest) > 0 {
		s.Description, _ = counted(rest[1:]) // endsStream has looked at it
	}
	return s, nil
}

// counted reads a 32-bit length and as many bytes.
func counted(b []byte) ([]byte, bool) {
	if len(b) < 4 {
		return nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, false
	}
	return b[4 : 4+n], true
}

func printable(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c > 0x7e {
			return false
		}
	}
	return true
}

// Bounds on what a section's header is believed to say. QEMU numbers sections from 0 and versions below a hundred.
const (
	maxSectionID = 1 << 20
	maxVersion   = 1 << 16
)

// sectionAt reads the header of a section, and tells whether there is one.
func sectionAt(stream []byte, at int) (Section, bool) {
	b := stream[min(at, len(stream)):]
	if len(b) < 6 || b[0] != typeSectionFull {
		return Section{}, false
	}
	n := int(b[5])
	if n == 0 || len(b) < 6+n+8 || !printable(b[6:6+n]) {
		return Section{}, false
	}
	s := Section{
		ID:       binary.BigEndian.Uint32(b[1:]),
		Name:     string(b[6 : 6+n]),
		Instance: binary.BigEndian.Uint32(b[6+n:]),
		Version:  binary.BigEndian.Uint32(b[10+n:]),
		Offset:   at + 6 + n + 8,
	}
	return s, s.ID <= maxSectionID && s.Version <= maxVersion
}

// endsStream tells whether the stream ends properly from at on: the end mark, then a description or nothing.
func endsStream(stream []byte, at int) bool {
	if at >= len(stream) || stream[at] != typeEOF {
		return false
	}
	rest := stream[at+1:]
	if len(rest) == 0 {
		return true
	}
	text, ok := counted(rest[1:])
	return ok && rest[0] == typeVMDescription && len(text) == len(rest)-5
}

// maxBoundaries bounds the work that a stream made for it can cause: it grows with their square. An honest stream has one
// a section, and the odd one by chance.
const maxBoundaries = 4096

// boundary is a place where a section could end: a footer, and behind it a section's header or the end of the stream.
type boundary struct {
	footer int // offset of the footer
	next   Section
	last   bool // the end of the stream follows

	ways int // how many readings of the stream lead here, counted to 2
	from int // the boundary before it in the reading that was found first
}

// parseSections finds the one way to read the sections from at on, and where they end. Since a state has no length, every
// boundary is a candidate; the reading is a path from the first header to the end, each section closed by a footer with
// its own id.
func parseSections(stream []byte, at int) ([]Section, int, error) {
	if endsStream(stream, at) {
		return nil, at, nil
	}
	first, ok := sectionAt(stream, at)
	if !ok {
		return nil, 0, &FormatError{at, "no section begins here"}
	}
	bs := []boundary{{next: first, ways: 1}}
	byID := make(map[uint32][]int) // boundaries by the id in their footer, ascending
	for i := first.Offset; ; i++ {
		n := bytes.IndexByte(stream[i:], typeSectionFooter)
		if n < 0 || i+n+footerBytes >= len(stream) {
			break
		}
		i += n
		next, more := sectionAt(stream, i+footerBytes)
		last := endsStream(stream, i+footerBytes)
		if !more && !last {
			continue
		}
		if len(bs) == maxBoundaries {
			return nil, 0, &FormatError{i, fmt.Sprintf("more than %d places where a section could end", maxBoundaries)}
		}
		id := binary.BigEndian.Uint32(stream[i+1:])
		byID[id] = append(byID[id], len(bs))
		bs = append(bs, boundary{footer: i, next: next, last: last})
	}

	// Boundaries are in the order of the stream, so each is final by the time it is left.
	furthest, end, ways := 0, -1, 0
	for i := range bs {
		b := bs[i]
		if b.ways == 0 {
			continue
		}
		furthest = i
		if b.last {
			end, ways = i, ways+b.ways
			continue
		}
		for _, j := range byID[b.next.ID] {
			if bs[j].footer < b.next.Offset {
				continue
			}
			if bs[j].ways == 0 {
				bs[j].from = i
			}
			bs[j].ways = min(2, bs[j].ways+b.ways)
		}
	}
	switch {
	case end < 0:
		s := bs[furthest].next
		return nil, 0, &FormatError{s.Offset, fmt.Sprintf("section %v has no end", s)}
	case ways > 1:
		return nil, 0, &FormatError{at, "can be read in more than one way"}
	}

	var sections []Section
	for i := end; i != 0; i = bs[i].from {
		s := bs[bs[i].from].next
		s.Bytes = bs[i].footer - s.Offset
		sections = append(sections, s)
	}
	slices.Reverse(sections)
	seen := make(map[uint32]bool, len(sections))
	for _, s := range sections {
		if seen[s.ID] {
			return nil, 0, &FormatError{s.Offset, fmt.Sprintf("section %v has the id of an earlier one", s)}
		}
		seen[s.ID] = true
	}
	return sections, bs[end].footer + footerBytes, nil
}

// nestedState is how the state of KVM's nested virtualization begins within a processor's section: a subsection (QEMU_VM_SUBSECTION), the
// length of its name, its name. It is there while the guest uses its hypervisor's extensions: on Intel's from VMXON on, on AMD's while an inner
// guest runs (QEMU, target/i386/machine.c, nested_state_needed).
const nestedState = "\x05\x14cpu/kvm_nested_state"

// HasNestedGuests tells whether the guest runs guests of its own under KVM. What looks so in a device's data makes it true as well.
func HasNestedGuests(stream []byte) bool { return bytes.Contains(stream, []byte(nestedState)) }
