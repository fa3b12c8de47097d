package qemu

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func someMachine() Machine {
	seven := uint32(7)
	return Machine{
		QEMU: Version{10, 0, 2, "Debian"}, Target: "x86_64", Type: "pc-q35-7.2", Accelerator: "kvm",
		Guest: "ns_vm", UUID: "u",
		CPUs:     []CPU{{"Westmere-x86_64-cpu", map[string]int{"socket-id": 0}, true}, {"Westmere-x86_64-cpu", map[string]int{"socket-id": 1}, false}},
		Features: []FeatureWord{{1, nil, "EDX", 0x0f}, {7, &seven, "EBX", 0}},
		RAM:      []RAMSize{{"pc.ram", 1 << 20}, {"/rom@etc/acpi/tables", 0x20000}},
		LowRAM:   4 << 30,
		Devices: []Device{
			{"/hpet[0]", "hpet", "", map[string]string{"timers": "3 (0x3)"}},
			{"/net[0]", "net", "n", map[string]string{"mac": "a", "netdev": "x", "host_mtu": "1500 (0x5dc)"}},
		},
	}
}

func TestCompare(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Machine)
		want   []string // the fatal ones with a !
	}{
		"nothing":          {func(*Machine) {}, nil},
		"newer":            {func(m *Machine) { m.QEMU.Minor++ }, []string{"QEMU version: 10.0.2 in the image, 10.1.2 here"}},
		"older":            {func(m *Machine) { m.QEMU = Version{9, 9, 9, "Debian"} }, []string{"!QEMU version: 10.0.2 in the image, 9.9.9 here"}},
		"another package":  {func(m *Machine) { m.QEMU.Package = "RHEL" }, []string{"QEMU package: Debian in the image, RHEL here"}},
		"machine type":     {func(m *Machine) { m.Type = "pc-q35-8.0" }, []string{"!machine type: pc-q35-7.2 in the image, pc-q35-8.0 here"}},
		"accelerator":      {func(m *Machine) { m.Accelerator = "tcg" }, []string{"!accelerator: kvm in the image, tcg here"}},
		"architecture":     {func(m *Machine) { m.Target = "aarch64" }, []string{"!architecture: x86_64 in the image, aarch64 here"}},
		"a clone":          {func(m *Machine) { m.Guest, m.UUID = "b", "v" }, []string{"guest name: ns_vm in the image, b here", "guest uuid: u in the image, v here"}},
		"CPU model":        {func(m *Machine) { m.CPUs[0].Model = "x" }, []string{"!CPU socket-id 0000: Westmere-x86_64-cpu in the image, x here"}},
		"CPU plugged":      {func(m *Machine) { m.CPUs[1].Taken = true }, []string{"!CPU socket-id 0001: empty slot for Westmere-x86_64-cpu in the image, Westmere-x86_64-cpu here"}},
		"a slot less":      {func(m *Machine) { m.CPUs = m.CPUs[:1] }, []string{"!CPU socket-id 0001: empty slot for Westmere-x86_64-cpu in the image, missing here"}},
		"a feature gone":   {func(m *Machine) { m.Features[0].Bits = 0x17 }, []string{"!CPUID 0x1 EDX: 0x0000000f in the image, 0x00000017 here"}},
		"a feature new":    {func(m *Machine) { m.Features[1].Bits = 1 }, []string{"CPUID 0x7.0x7 EBX: 0x00000000 in the image, 0x00000001 here"}},
		"memory size":      {func(m *Machine) { m.RAM[0].Bytes *= 2 }, []string{"!RAM block pc.ram: 1048576 bytes in the image, 2097152 bytes here"}},
		"table size":       {func(m *Machine) { m.RAM[1].Bytes *= 2 }, []string{"RAM block /rom@etc/acpi/tables: 131072 bytes in the image, 262144 bytes here"}},
		"memory elsewhere": {func(m *Machine) { m.LowRAM = 1 << 31 }, []string{"!RAM below 4 GiB: 4294967296 bytes at most in the image, 2147483648 bytes at most here"}},
		"not known where":  {func(m *Machine) { m.LowRAM = 0 }, nil},
		"a block less":     {func(m *Machine) { m.RAM = m.RAM[:1] }, []string{"!RAM block /rom@etc/acpi/tables: 131072 bytes in the image, missing here"}},
		"a device less":    {func(m *Machine) { m.Devices = m.Devices[:1] }, []string{`!device /net[0]: net with id "n" in the image, missing here`}},
		"a device more":    {func(m *Machine) { m.Devices = append(m.Devices, Device{Path: "/x", Type: "x"}) }, []string{"!device /x: x here, nothing in the image"}},
		"a property":       {func(m *Machine) { m.Devices[1].Properties["host_mtu"] = "9000" }, []string{"!host_mtu of device /net[0]: 1500 (0x5dc) in the image, 9000 here"}},
		"a new property":   {func(m *Machine) { m.Devices[0].Properties["x-new"] = "on" }, nil},
		"the host's side":  {func(m *Machine) { m.Devices[1].Properties["netdev"] = "y" }, nil},
		"another MAC":      {func(m *Machine) { m.Devices[1].Properties["mac"] = "b" }, []string{"mac of device /net[0]: a in the image, b here"}},
		"another id":       {func(m *Machine) { m.Devices[1].ID = "o" }, []string{"id of device /net[0]: n in the image, o here"}},
		"fatal ones first": {func(m *Machine) { m.Guest, m.Devices = "b", m.Devices[:1] }, []string{`!device /net[0]: net with id "n" in the image, missing here`, "guest name: ns_vm in the image, b here"}},
	} {
		t.Run(name, func(t *testing.T) {
			present := someMachine()
			c.change(&present)
			var got []string
			for _, d := range Compare(someMachine(), present) {
				s := d.String()
				if d.Fatal {
					s = "!" + s
				}
				got = append(got, s)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// The same command line twice is the same machine, whatever the guest did in the first; the description survives JSON.
func TestDescribeRealQEMU(t *testing.T) {
	args := []string{"-machine", "q35", "-m", "64", "-smp", "1,maxcpus=2", "-device", "VGA", "-device", "virtio-balloon-pci,id=b",
		"-device", "qemu-xhci", "-device", "usb-tablet"}
	forEachQEMU(t, func(t *testing.T, e emulator) {
		describe := func(args ...string) Machine {
			g := e.start(t, nil, args...)
			m, p := g.dial(t), g.find(t)
			d, err := Describe(t.Context(), m, p)
			if err != nil {
				t.Fatal(err)
			}
			text, err := json.Marshal(d)
			if err != nil {
				t.Fatal(err)
			}
			var back Machine
			if err := json.Unmarshal(text, &back); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s on %v: %d devices, %d bytes", d.Type, d.QEMU, len(d.Devices), len(text))
			return back
		}
		first, second := describe(args...), describe(append(args, "-S")...)
		second.Guest = first.Guest
		if d := Compare(first, second); len(d) > 0 {
			t.Errorf("the same machine: %v", d)
		}
		if len(first.CPUs) != 2 || len(first.Features) == 0 || len(first.Devices) < 15 || first.Accelerator != "tcg" || first.Target != "x86_64" {
			t.Errorf("described as %+v", first)
		}
		other := Compare(first, describe("-machine", "q35", "-m", "128", "-cpu", "Westmere", "-S"))
		for _, want := range []string{"RAM block pc.ram", "CPU core-id 0000 socket-id 0000 thread-id 0000", "device /q35-pcihost[0]/VGA@01.0"} {
			if !slices.ContainsFunc(other, func(d Difference) bool { return d.Fatal && d.What == want }) {
				t.Errorf("%q is not among %v", want, other)
			}
		}
	})
}
