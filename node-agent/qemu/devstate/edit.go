package devstate

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// noDescription is the description that Loadable adds: it says nothing, and that keeps the loader from warning.
const noDescription = "{}"

// Loadable returns the stream as saved with what a loader wants added: the configuration, naming the canonical machine
// type ("pc-q35-10.0", no alias), and a description. A loader refuses a machine type that is not its own.
func Loadable(saved []byte, machine string) ([]byte, error) {
	s, err := Parse(saved)
	switch {
	case err != nil:
		return nil, err
	case s.Machine != "" || s.Description != nil:
		return nil, &FormatError{headerBytes, "has been made loadable before"}
	case machine == "" || len(machine) > 255 || !printable([]byte(machine)):
		return nil, fmt.Errorf("make the device state loadable: bad machine type %.80q", machine)
	}
	out := make([]byte, 0, len(saved)+5+len(machine)+5+len(noDescription))
	out = append(out, saved[:headerBytes]...)
	out = append(out, typeConfiguration)
	out = binary.BigEndian.AppendUint32(out, uint32(len(machine)))
	out = append(out, machine...)
	out = append(out, saved[headerBytes:]...)
	out = append(out, typeVMDescription)
	out = binary.BigEndian.AppendUint32(out, uint32(len(noDescription)))
	return append(out, noDescription...), nil
}

// SameDevices returns an error naming the first difference where two saves of one QEMU process do not have the same
// devices in the same order. What the devices' states hold, and how long they are, may differ.
func SameDevices(before, now []Section) error {
	for i, s := range now {
		switch {
		case i >= len(before):
			return fmt.Errorf("device state: %v is new", s)
		case s.ID != before[i].ID || s.Name != before[i].Name || s.Instance != before[i].Instance || s.Version != before[i].Version:
			if slices.ContainsFunc(before, func(b Section) bool { return b.Name == s.Name && b.Instance == s.Instance }) {
				return fmt.Errorf("device state: %v stands where %v was", s, before[i])
			}
			return fmt.Errorf("device state: %v is new", s)
		}
	}
	if len(before) > len(now) {
		return fmt.Errorf("device state: %v is gone", before[len(now)])
	}
	return nil
}
