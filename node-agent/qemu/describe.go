package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Machine is what a VM is made of: what another QEMU must have as well to take its state. It is recorded in an image.
type Machine struct {
	QEMU        Version `json:"qemu"`
	Target      string  `json:"target"`      // architecture: x86_64, aarch64
	Type        string  `json:"type"`        // canonical machine type: pc-q35-10.0, no alias
	Accelerator string  `json:"accelerator"` // kvm, tcg

	Guest string `json:"guest,omitempty"`
	UUID  string `json:"uuid,omitempty"`

	CPUs     []CPU         `json:"cpus"`               // every slot, taken or not
	Features []FeatureWord `json:"features,omitempty"` // CPUID as the guest sees it, x86 only

	RAM []RAMSize `json:"ram"`

	// LowRAM is where RAM below 4 GiB ends at the latest, in bytes, and goes on above 4 GiB: the same RAM block lies elsewhere for the guest
	// then. Machine types of PCs have it; 0 where there is no such thing, or the image is older than this.
	LowRAM uint64 `json:"lowRAM,omitempty"`

	Devices []Device `json:"devices"`
	// WritableDisks are the images behind those block devices that the guest can write: by file where there is one, else by name. What is in
	// them is no part of a checkpoint. For people; it does not matter to a restore.
	WritableDisks []string `json:"writableDisks,omitempty"`

	Firmware string `json:"firmware,omitempty"` // as the command line names it; "" is QEMU's default
}

// CPU is a slot for a processor.
type CPU struct {
	Model string         `json:"model"`           // QEMU's type: Westmere-x86_64-cpu
	Place map[string]int `json:"place,omitempty"` // socket-id, core-id, thread-id, ...
	Taken bool           `json:"taken"`
}

// FeatureWord is a register of one CPUID leaf.
type FeatureWord struct {
	EAX      uint32  `json:"cpuid-input-eax"`
	ECX      *uint32 `json:"cpuid-input-ecx,omitempty"`
	Register string  `json:"cpuid-register"`
	Bits     uint32  `json:"features"`
}

func (w FeatureWord) leaf() string {
	if w.ECX != nil {
		return fmt.Sprintf("CPUID %#x.%#x %s", w.EAX, *w.ECX, w.Register)
	}
	return fmt.Sprintf("CPUID %#x %s", w.EAX, w.Register)
}

// RAMSize is a RAM block's name and used length.
type RAMSize struct {
	Name  string `json:"name"`
	Bytes uint64 `json:"bytes"`
}

// maxCPUs bounds what is believed; QEMU's largest machine type has 4096.
const maxCPUs = 1 << 16

// Describe asks QEMU what the machine is made of. Nine or ten commands, none of which stops the guest.
func Describe(ctx context.Context, m Monitor, p *Process) (Machine, error) {
	d := Machine{Guest: p.Guest}
	for _, part := range []struct {
		what string
		read func() error
	}{
		{"version", func() (err error) { d.QEMU, err = queryVersion(ctx, m); return err }},
		{"target", func() error {
			var r struct {
				Arch string `json:"arch"`
			}
			err := m.Execute(ctx, "query-target", nil, &r)
			d.Target = r.Arch
			return err
		}},
		{"machine type", func() (err error) { d.Type, err = MachineType(ctx, m); return err }},
		{"accelerator", func() error {
			var r struct {
				Enabled bool `json:"enabled"`
			}
			err := m.Execute(ctx, "query-kvm", nil, &r)
			d.Accelerator = "tcg"
			if r.Enabled {
				d.Accelerator = "kvm"
			}
			return err
		}},
		{"uuid", func() error {
			var r struct {
				UUID string `json:"UUID"`
			}
			err := m.Execute(ctx, "query-uuid", nil, &r)
			d.UUID = strings.ToLower(r.UUID)
			return err
		}},
		{"CPUs", func() (err error) { d.CPUs, d.Features, err = queryCPUs(ctx, m); return err }},
		{"RAM blocks", func() error {
			text, err := Human(ctx, m, "info ramblock")
			if err != nil {
				return err
			}
			rows, _, err := parseRAMBlocks(text)
			for _, r := range rows {
				d.RAM = append(d.RAM, RAMSize{r.name, roundUp(r.usedBytes)})
			}
			return err
		}},
		{"place of RAM", func() error {
			args := map[string]string{"path": "/machine", "property": "max-ram-below-4g"} // QEMU, hw/i386/pc.c
			err := m.Execute(ctx, "qom-get", args, &d.LowRAM)
			if asQMPError(err) != nil {
				return nil // another kind of machine
			}
			return err
		}},
		{"devices", func() error {
			text, err := Human(ctx, m, "info qtree")
			if err != nil {
				return err
			}
			d.Devices, err = parseQTree(text)
			return err
		}},
		{"disks", func() (err error) { d.WritableDisks, err = writableDisks(ctx, m); return err }},
	} {
		if err := part.read(); err != nil {
			return Machine{}, fmt.Errorf("describe qemu %v: %s: %w", p, part.what, err)
		}
	}
	d.Firmware = firmwareOption(parseOptions(p.Args[min(1, len(p.Args)):]))
	return d, nil
}

func queryVersion(ctx context.Context, m Monitor) (Version, error) {
	var r struct {
		QEMU    Version `json:"qemu"`
		Package string  `json:"package"`
	}
	err := m.Execute(ctx, "query-version", nil, &r)
	r.QEMU.Package = strings.TrimSpace(r.Package)
	return r.QEMU, err
}

// MachineType asks for the canonical name of the machine type in use, which a device state must carry to be loaded.
func MachineType(ctx context.Context, m Monitor) (string, error) {
	var typename string
	args := map[string]string{"path": "/machine", "property": "type"}
	if err := m.Execute(ctx, "qom-get", args, &typename); err != nil {
		return "", fmt.Errorf("ask for the machine type: %w", err)
	}
	name, ok := strings.CutSuffix(typename, "-machine")
	if !ok {
		return "", fmt.Errorf("ask for the machine type: the machine is a %.80q", typename)
	}
	return name, nil
}

// queryCPUs lists the slots, and the features of the first CPU: the others have the same.
func queryCPUs(ctx context.Context, m Monitor) ([]CPU, []FeatureWord, error) {
	var slots []struct {
		Type  string         `json:"type"`
		Count int            `json:"vcpus-count"`
		Path  string         `json:"qom-path"`
		Props map[string]int `json:"props"`
	}
	err := m.Execute(ctx, "query-hotpluggable-cpus", nil, &slots)
	var refused *QMPError
	if err != nil && !errors.As(err, &refused) {
		return nil, nil, err
	}
	var running []struct {
		Path  string         `json:"qom-path"`
		Props map[string]int `json:"props"`
	}
	if err := m.Execute(ctx, "query-cpus-fast", nil, &running); err != nil {
		return nil, nil, err
	}
	if len(slots) > maxCPUs || len(running) == 0 || len(running) > maxCPUs {
		return nil, nil, fmt.Errorf("%d CPUs in %d slots", len(running), len(slots))
	}
	var cpus []CPU
	for _, s := range slots {
		cpus = append(cpus, CPU{Model: s.Type, Place: s.Props, Taken: s.Path != ""})
	}
	if refused != nil { // the machine type has no hot-pluggable CPUs
		for _, r := range running {
			c := CPU{Place: r.Props, Taken: true}
			if err := m.Execute(ctx, "qom-get", map[string]string{"path": r.Path, "property": "type"}, &c.Model); err != nil {
				return nil, nil, err
			}
			cpus = append(cpus, c)
		}
	}
	slices.SortFunc(cpus, func(a, b CPU) int { return strings.Compare(a.place(), b.place()) })

	var features []FeatureWord
	err = m.Execute(ctx, "qom-get", map[string]string{"path": running[0].Path, "property": "feature-words"}, &features)
	if err != nil && !errors.As(err, &refused) { // other architectures have none
		return nil, nil, err
	}
	return cpus, features, nil
}

// place orders and compares slots.
func (c CPU) place() string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(c.Place)) {
		fmt.Fprintf(&b, "%s %04d ", k, c.Place[k])
	}
	return strings.TrimSpace(b.String())
}

// firmwareOption is what the command line says of the firmware.
func firmwareOption(opts []option) string {
	firmware := ""
	for _, o := range opts {
		switch o.name {
		case "bios":
			firmware = o.value
		case "pflash":
			firmware = "pflash " + o.value
		case "drive":
			if kv := parseKeyval(o.value, ""); kv["if"] == "pflash" && (kv["unit"] == "0" || firmware == "") {
				firmware = "pflash " + kv["file"]
			}
		case "machine", "M":
			kv := parseKeyval(o.value, "type")
			if node := kv["pflash0"]; node != "" {
				firmware = "pflash " + node
			}
			if file := kv["firmware"]; file != "" {
				firmware = file
			}
		}
	}
	return firmware
}
