package qemu

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const someQTree = `bus: main-system-bus
  type System
  dev: hpet, id ""
    gpio-in "" 2
    timers = 3 (0x3)
    mmio 00000000fed00000/0000000000000400
  dev: q35-pcihost, id ""
    MCFG = 2952790016 (0xb0000000)
    bus: pcie.0
      type PCIE
      dev: pcie-root-port, id "rp"
        chassis = 1 (0x1)
        addr = 02.0
        class PCI bridge, addr 00:02.0, pci id 1b36:000c (sub 0000:0000)
        bar 0: mem at 0xfea19000 [0xfea19fff]
        bus: rp
          type PCIE
          dev: virtio-net-pci, id "net"
            addr = 00.0
            bus: virtio-bus
              type virtio-pci-bus
              dev: virtio-net-device, id ""
                mac = "52:54:00:11:22:33"
      dev: ich9-ahci, id ""
        addr = 1f.2
        bus: ide.0
          type IDE
          dev: ide-hd, id "a"
            serial = "QM00001"
        bus: ide.1
          type IDE
          dev: ide-hd, id "b"
      dev: usb-kbd, id ""
      dev: usb-kbd, id ""
`

func TestParseQTree(t *testing.T) {
	want := []Device{
		{"/hpet[0]", "hpet", "", map[string]string{"timers": "3 (0x3)"}},
		{"/q35-pcihost[0]", "q35-pcihost", "", map[string]string{"MCFG": "2952790016 (0xb0000000)"}},
		{"/q35-pcihost[0]/pcie-root-port@02.0", "pcie-root-port", "rp",
			map[string]string{"addr": "02.0", "chassis": "1 (0x1)", "pci id": "1b36:000c (sub 0000:0000)"}},
		{"/q35-pcihost[0]/pcie-root-port@02.0/virtio-net-pci@00.0", "virtio-net-pci", "net", map[string]string{"addr": "00.0"}},
		{"/q35-pcihost[0]/pcie-root-port@02.0/virtio-net-pci@00.0/virtio-net-device[0]", "virtio-net-device", "",
			map[string]string{"mac": `"52:54:00:11:22:33"`}},
		{"/q35-pcihost[0]/ich9-ahci@1f.2", "ich9-ahci", "", map[string]string{"addr": "1f.2"}},
		{"/q35-pcihost[0]/ich9-ahci@1f.2/ide-hd[0]", "ide-hd", "a", map[string]string{"serial": `"QM00001"`}},
		{"/q35-pcihost[0]/ich9-ahci@1f.2/bus[1]/ide-hd[0]", "ide-hd", "b", map[string]string{}},
		{"/q35-pcihost[0]/usb-kbd[0]", "usb-kbd", "", map[string]string{}},
		{"/q35-pcihost[0]/usb-kbd[1]", "usb-kbd", "", map[string]string{}},
	}
	got, err := parseQTree(strings.ReplaceAll(someQTree, "\n", "\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for name, text := range map[string]string{
		"nothing":               "",
		"an error message":      "unknown command: 'info qtree'\n",
		"an unknown device":     "bus: b\n  dev: x\n",
		"two at one address":    "bus: b\n  dev: x, id \"\"\n    addr = 01.0\n  dev: x, id \"\"\n    addr = 01.0\n",
		"more than is believed": strings.Repeat("dev: x, id \"\"\n", maxDevices+1),
		"longer":                strings.Repeat(" ", maxQTreeBytes+1),
	} {
		if got, err := parseQTree(text); err == nil {
			t.Errorf("%s: gave %d devices", name, len(got))
		}
	}
}

func FuzzParseQTree(f *testing.F) {
	f.Add(someQTree)
	f.Fuzz(func(t *testing.T, text string) {
		devices, err := parseQTree(text)
		if err != nil {
			return
		}
		for _, d := range devices {
			if d.Type == "" || !strings.HasPrefix(d.Path, "/") {
				t.Fatalf("accepted %+v", d)
			}
		}
	})
}
