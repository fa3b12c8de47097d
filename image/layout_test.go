package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestLayoutDifference(t *testing.T) {
	was := []BlockInfo{{"pc.ram", 256 << 20}, {"vga", 16 << 20}, {"rom", 260 << 10}}
	long := strings.Repeat("é", 120)
	var many []BlockInfo
	for n := range 4096 {
		many = append(many, BlockInfo{fmt.Sprintf("%s%d", long, n), 4096})
	}
	for _, c := range []struct {
		is   []BlockInfo
		want string
	}{
		{was, ""},
		{[]BlockInfo{{"pc.ram", 384 << 20}, {"vga", 16 << 20}, {"rom", 260 << 10}}, "pc.ram: 256 MiB, now 384 MiB"},
		{[]BlockInfo{{"pc.ram", 256<<20 + 4096}, {"vga", 0}, {"rom", 1 << 30}},
			"pc.ram: 256 MiB, now 262148 KiB, vga: 16 MiB, now 0 bytes, rom: 260 KiB, now 1 GiB"},
		{[]BlockInfo{{"pc.ram", 256 << 20}, {"rom", 260 << 10}, {"nic", 64 << 10}}, "vga (16 MiB) is gone, nic (64 KiB) is new"},
		{[]BlockInfo{{"vga", 16 << 20}, {"pc.ram", 256 << 20}, {"rom", 260 << 10}}, "the same blocks are in another order"},
		{nil, "pc.ram (256 MiB) is gone, vga (16 MiB) is gone, rom (260 KiB) is gone"},
	} {
		if got := layoutDifference(was, c.is); got != c.want {
			t.Errorf("%v: %q, want %q", c.is, got, c.want)
		}
	}
	got := layoutDifference(was, many)
	if len(got) > 500 || !strings.HasSuffix(got, ", and 4094 more") || !strings.Contains(got, strings.Repeat("é", 32)+"… (4 KiB) is new") {
		t.Errorf("%d bytes: %s", len(got), got)
	}

	r := newRepository(t, testKeys(false))
	parent := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
	_, err := r.Create(context.Background(), Spec{Name: "child", Parent: parent, Blocks: []BlockInfo{{"ram", 128 << 10}}})
	if unfit := new(ParentError); !errors.As(err, &unfit) || unfit.Reason != "its memory is laid out differently (ram: 80 KiB, now 128 KiB)" {
		t.Error(err)
	}
}
