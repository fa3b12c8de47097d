package image

import (
	"fmt"
	"slices"
	"strings"
)

const (
	// differencesShown bounds a text, as do shownName bytes of a block's name: a machine may have thousands of blocks.
	differencesShown = 5
	shownName        = 64
)

// layoutDifference says in words what of a memory's blocks is not as it was; "" where all is.
func layoutDifference(was, is []BlockInfo) string {
	if slices.Equal(was, is) {
		return ""
	}
	before, now := bytesByName(was), bytesByName(is)
	var parts []string
	for _, b := range was {
		size, there := now[b.Name]
		switch {
		case !there:
			parts = append(parts, fmt.Sprintf("%s (%s) is gone", shortName(b.Name), sizeText(b.Bytes)))
		case size != b.Bytes:
			parts = append(parts, fmt.Sprintf("%s: %s, now %s", shortName(b.Name), sizeText(b.Bytes), sizeText(size)))
		}
	}
	for _, b := range is {
		if _, there := before[b.Name]; !there {
			parts = append(parts, fmt.Sprintf("%s (%s) is new", shortName(b.Name), sizeText(b.Bytes)))
		}
	}
	if len(parts) == 0 {
		return "the same blocks are in another order"
	}
	if more := len(parts) - differencesShown; more > 0 {
		parts = append(parts[:differencesShown], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

func bytesByName(blocks []BlockInfo) map[string]uint64 {
	sizes := make(map[string]uint64, len(blocks))
	for _, b := range blocks {
		sizes[b.Name] = b.Bytes
	}
	return sizes
}

func shortName(name string) string {
	if len(name) <= shownName {
		return name
	}
	return strings.ToValidUTF8(name[:shownName], "") + "…"
}

// sizeText is exact for whole pages: sizes that differ look different.
func sizeText(bytes uint64) string {
	for _, unit := range []struct {
		bits uint
		name string
	}{{30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if bytes > 0 && bytes&(1<<unit.bits-1) == 0 {
			return fmt.Sprintf("%d %s", bytes>>unit.bits, unit.name)
		}
	}
	return fmt.Sprintf("%d bytes", bytes)
}
