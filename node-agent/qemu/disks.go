package qemu

import (
	"context"
	"path"
	"slices"
	"strings"
)

// maxDisks bounds what is believed and recorded.
const maxDisks = 256

// writableDisks asks for the disks that the guest can write.
func writableDisks(ctx context.Context, m Monitor) ([]string, error) {
	var devices []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted *struct {
			File     string `json:"file"`
			Node     string `json:"node-name"`
			ReadOnly bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := m.Execute(ctx, "query-block", nil, &devices); err != nil {
		return nil, err
	}
	var disks []string
	for _, d := range devices {
		if d.Inserted == nil || d.Inserted.ReadOnly || len(disks) == maxDisks {
			continue
		}
		disks = append(disks, diskName(d.Inserted.File, d.Device, d.Inserted.Node, d.QDev))
	}
	slices.Sort(disks)
	return slices.Compact(disks), nil
}

// diskName is the name of a disk's file, or the first of its other names that there is: what QEMU puts in place of a file, a URI or options as
// JSON, is long and can have a secret in it.
func diskName(file string, others ...string) string {
	if file != "" && (strings.HasPrefix(file, "/") || !strings.Contains(file, ":")) {
		return path.Base(file)
	}
	for _, name := range others {
		if name != "" {
			return name
		}
	}
	return "(without a name)"
}
