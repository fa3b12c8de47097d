package qemu

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
)

// Difference is one way in which two machines are not the same. A fatal one means that a state of the recorded machine
// must not be loaded into the other: QEMU would refuse it, or the guest would find other hardware under it.
type Difference struct {
	What     string `json:"what"`
	Recorded string `json:"recorded,omitempty"` // "" where it has none
	Present  string `json:"present,omitempty"`
	Fatal    bool   `json:"fatal"`
}

func (d Difference) String() string {
	switch {
	case d.Recorded == "":
		return fmt.Sprintf("%s: %s here, nothing in the image", d.What, d.Present)
	case d.Present == "":
		return fmt.Sprintf("%s: %s in the image, missing here", d.What, d.Recorded)
	}
	return fmt.Sprintf("%s: %s in the image, %s here", d.What, d.Recorded, d.Present)
}

// resizeableBlocks are tables that QEMU hands to the firmware. Their lengths belong to the device state: loading sets
// them (QEMU, hw/nvram/fw_cfg.c, fw_cfg_acpi_mr_restore).
var resizeableBlocks = set("/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp")

// hostProperties say how a device is connected to the host, or follow from what the guest did. They are no part of what the
// guest sees.
var hostProperties = set(
	"MCFG", "audiodev", "backend", "bootindex", "busnr", "chardev", "cryptodev", "display", "drive", "ebpf-rss-fds", "fd", "filename",
	"head", "iothread", "iothread-vq-mapping", "logfile", "memdev", "netdev", "rng", "rombar", "romfile", "script", "tpmdev",
	"werror", "rerror", "share-rw", "account-failed", "account-invalid", "stats-intervals",
	"smb_io_base", // a register that firmware moves
)

// notedProperties tell guests apart, or follow from a disk's size. A clone has others, and its state loads all the same.
var notedProperties = set("cyls", "guid", "heads", "mac", "secs", "serial", "uuid", "wwn")

// Compare lists the differences between the machine of an image and the one at hand, those that are fatal first. Device
// properties that only one of two QEMU versions has are passed over: the machine type keeps their meaning the same.
func Compare(recorded, present Machine) []Difference {
	var c comparison
	c.fatal("architecture", recorded.Target, present.Target)
	c.fatal("machine type", recorded.Type, present.Type)
	c.fatal("accelerator", recorded.Accelerator, present.Accelerator)
	// A machine type holds its promise towards newer QEMUs only.
	c.add("QEMU version", recorded.QEMU.String(), present.QEMU.String(), present.QEMU.Compare(recorded.QEMU) < 0)
	c.note("QEMU package", recorded.QEMU.Package, present.QEMU.Package)
	c.note("guest name", recorded.Guest, present.Guest)
	c.note("guest uuid", recorded.UUID, present.UUID)
	c.note("firmware", recorded.Firmware, present.Firmware)
	c.cpus(recorded.CPUs, present.CPUs)
	c.features(recorded.Features, present.Features)
	c.ram(recorded.RAM, present.RAM)
	if recorded.LowRAM != 0 && present.LowRAM != 0 {
		c.fatal("RAM below 4 GiB", fmt.Sprintf("%d bytes at most", recorded.LowRAM), fmt.Sprintf("%d bytes at most", present.LowRAM))
	}
	c.devices(recorded.Devices, present.Devices)
	slices.SortStableFunc(c.found, func(a, b Difference) int {
		return cmp.Compare(rank(a), rank(b))
	})
	return c.found
}

func rank(d Difference) int {
	if d.Fatal {
		return 0
	}
	return 1
}

type comparison struct{ found []Difference }

func (c *comparison) add(what, recorded, present string, fatal bool) {
	if recorded != present {
		c.found = append(c.found, Difference{what, recorded, present, fatal})
	}
}

func (c *comparison) fatal(what, recorded, present string) { c.add(what, recorded, present, true) }
func (c *comparison) note(what, recorded, present string)  { c.add(what, recorded, present, false) }

// match pairs the elements of two lists by a key and calls both with each pair, or with a nil.
func match[T any](recorded, present []T, key func(T) string, both func(key string, r, p *T)) {
	left := make(map[string]*T, len(present))
	for i := range present {
		left[key(present[i])] = &present[i]
	}
	for i := range recorded {
		k := key(recorded[i])
		both(k, &recorded[i], left[k])
		delete(left, k)
	}
	for i := range present {
		if k := key(present[i]); left[k] != nil {
			both(k, nil, &present[i])
		}
	}
}

func (c *comparison) cpus(recorded, present []CPU) {
	describe := func(cpu *CPU) string {
		switch {
		case cpu == nil:
			return ""
		case cpu.Taken:
			return cpu.Model
		}
		return "empty slot for " + cpu.Model
	}
	match(recorded, present, CPU.place, func(place string, r, p *CPU) { c.fatal("CPU "+place, describe(r), describe(p)) })
}

func (c *comparison) features(recorded, present []FeatureWord) {
	match(recorded, present, FeatureWord.leaf, func(leaf string, r, p *FeatureWord) {
		var had, has uint32
		if r != nil {
			had = r.Bits
		}
		if p != nil {
			has = p.Bits
		}
		// A feature that is gone is one that the guest may be using; one that is new, it does not know of.
		c.add(leaf, fmt.Sprintf("0x%08x", had), fmt.Sprintf("0x%08x", has), had&^has != 0)
	})
}

func (c *comparison) ram(recorded, present []RAMSize) {
	size := func(b *RAMSize) string {
		if b == nil {
			return ""
		}
		return strconv.FormatUint(b.Bytes, 10) + " bytes"
	}
	match(recorded, present, func(b RAMSize) string { return b.Name }, func(name string, r, p *RAMSize) {
		c.add("RAM block "+name, size(r), size(p), r == nil || p == nil || !resizeableBlocks[name])
	})
}

func (c *comparison) devices(recorded, present []Device) {
	kind := func(d *Device) string {
		switch {
		case d == nil:
			return ""
		case d.ID != "":
			return fmt.Sprintf("%s with id %q", d.Type, d.ID)
		}
		return d.Type
	}
	match(recorded, present, func(d Device) string { return d.Path }, func(path string, r, p *Device) {
		if r == nil || p == nil {
			c.fatal("device "+path, kind(r), kind(p))
			return
		}
		c.note("id of device "+path, r.ID, p.ID)
		for _, name := range sortedKeys(r.Properties) {
			value, ok := p.Properties[name]
			if ok && !hostProperties[name] {
				c.add(fmt.Sprintf("%s of device %s", name, path), r.Properties[name], value, !notedProperties[name])
			}
		}
	})
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
