package agent

import (
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/resource"
)

// clip cuts a text to so many bytes, at a whole character.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}

// sizeOf rounds a number of bytes up to three digits or four, for tables.
func sizeOf(bytes int64) *resource.Quantity {
	unit := int64(1)
	for bytes/unit >= 10240 {
		unit *= 1024
	}
	return resource.NewQuantity((bytes+unit-1)/unit*unit, resource.BinarySI)
}
