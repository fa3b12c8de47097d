package qemu

import "testing"

func TestDiskName(t *testing.T) {
	for _, c := range []struct{ file, device, node, want string }{
		{"/srv/vm/d.qcow2", "drive0", "node0", "d.qcow2"},
		{"/srv/a:b.raw", "", "node0", "a:b.raw"},
		{"d.qcow2", "", "", "d.qcow2"},
		{`json:{"driver":"nbd","password":"x"}`, "", "node0", "node0"},
		{"nbd://user:secret@host/x", "drive0", "node0", "drive0"},
		{"", "", "", "(without a name)"},
	} {
		if got := diskName(c.file, c.device, c.node); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
