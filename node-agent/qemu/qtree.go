package qemu

import (
	"fmt"
	"regexp"
	"strings"
)

// Device is one device of the machine.
type Device struct {
	// Path is where the device sits, so that the same place in another QEMU has the same path: from the main bus down,
	// each step the type, with the address on its bus, or else a count among its like.
	Path string `json:"path"`
	Type string `json:"type"`
	ID   string `json:"id,omitempty"`
	// Properties as QEMU prints them: how the device was made, not what the guest did with it.
	Properties map[string]string `json:"properties,omitempty"`
}

// Bounds on what is believed of a device tree: some tens of devices are usual, hundreds possible.
const (
	maxDevices    = 4096
	maxDevicePath = 4096 // bytes: each holds the names of all devices and buses above it
	maxQTreeBytes = 4 << 20
)

var (
	qtreeDevice   = regexp.MustCompile(`^dev: ([^,\s]+), id "(.*)"$`)
	qtreeProperty = regexp.MustCompile(`^([A-Za-z0-9_][A-Za-z0-9_.-]*) = (.*)$`)
	qtreePCI      = regexp.MustCompile(`^class .*, pci id ([0-9a-f]{4}:[0-9a-f]{4} \(sub [0-9a-f]{4}:[0-9a-f]{4}\))$`)
)

// parseQTree reads what `info qtree` prints (QEMU, system/qdev-monitor.c, qbus_print): buses and devices within one
// another, two blanks a level, a device's properties below it.
func parseQTree(text string) ([]Device, error) {
	if len(text) > maxQTreeBytes {
		return nil, fmt.Errorf("device tree of %d bytes; at most %d are believed", len(text), maxQTreeBytes)
	}
	type node struct {
		indent int
		path   string
		device int            // index, or -1 for a bus
		count  map[string]int // children by what is said of them
	}
	stack := []node{{indent: -1, device: -1, count: make(map[string]int)}}
	var devices []Device
	for _, line := range strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n") {
		item := strings.TrimLeft(line, " ")
		if item == "" {
			continue
		}
		indent := len(line) - len(item)
		for stack[len(stack)-1].indent >= indent {
			stack = stack[:len(stack)-1]
		}
		top := &stack[len(stack)-1]
		switch {
		case strings.HasPrefix(item, "bus: "):
			// A bus is named after its device's id, which need not be the same: its number among the device's buses is.
			path := top.path
			if n := top.count["bus"]; n > 0 {
				path = fmt.Sprintf("%s/bus[%d]", path, n)
			}
			top.count["bus"]++
			stack = append(stack, node{indent, path, -1, make(map[string]int)})
		case strings.HasPrefix(item, "dev: "):
			f := qtreeDevice.FindStringSubmatch(item)
			if f == nil {
				return nil, fmt.Errorf("device in an unknown form: %.120q", item)
			}
			if len(devices) == maxDevices {
				return nil, fmt.Errorf("more than %d devices", maxDevices)
			}
			n := top.count[f[1]]
			top.count[f[1]]++
			devices = append(devices, Device{Path: fmt.Sprintf("%s/%s[%d]", top.path, f[1], n), Type: f[1], ID: f[2],
				Properties: make(map[string]string)})
			if len(devices[len(devices)-1].Path) > maxDevicePath {
				return nil, fmt.Errorf("a device too deep in the tree: %.200q", devices[len(devices)-1].Path)
			}
			stack = append(stack, node{indent, devices[len(devices)-1].Path, len(devices) - 1, make(map[string]int)})
		case top.device < 0: // the bus's type
		default:
			d := &devices[top.device]
			if f := qtreePCI.FindStringSubmatch(item); f != nil {
				d.Properties["pci id"] = f[1]
			} else if f := qtreeProperty.FindStringSubmatch(item); f != nil {
				_, again := d.Properties[f[1]]
				d.Properties[f[1]] = f[2]
				if f[1] == "addr" && !again {
					// The address names the place better than the count does; what hangs below comes after.
					at := strings.LastIndexByte(d.Path, '[')
					d.Path = fmt.Sprintf("%s@%s", d.Path[:at], f[2])
					top.path = d.Path
				}
			}
		}
	}
	if len(devices) == 0 {
		return nil, fmt.Errorf("no devices in the device tree %.80q", text)
	}
	seen := make(map[string]bool, len(devices))
	for _, d := range devices {
		if seen[d.Path] {
			return nil, fmt.Errorf("two devices at %.200s", d.Path)
		}
		seen[d.Path] = true
	}
	return devices, nil
}
