package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// sizeText writes a number of bytes for people: 1.5 MiB.
func sizeText[N int64 | uint64](bytes N) string {
	const step = 1024
	if bytes < step {
		return fmt.Sprintf("%d B", bytes)
	}
	value, unit := float64(bytes), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		value /= step
		if value < step-0.05 { // not 1024.0 MiB for what is nearly a GiB
			break
		}
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}

// countText writes a number with its thousands apart: 262,144.
func countText(n uint64) string {
	digits := strconv.FormatUint(n, 10)
	var b strings.Builder
	for i, d := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			b.WriteByte(',')
		}
		b.WriteRune(d)
	}
	return b.String()
}

// durationText writes a duration with the digits that mean something: 3.21 ms, 1.2 s, 2m5s.
func durationText(d time.Duration) string {
	value, unit := float64(d), ""
	switch {
	case d == 0:
		return "0 s"
	case d < time.Millisecond:
		value, unit = value/float64(time.Microsecond), "µs"
	case d < time.Second:
		value, unit = value/float64(time.Millisecond), "ms"
	case d < time.Minute:
		value, unit = value/float64(time.Second), "s"
	default:
		return d.Round(time.Second).String()
	}
	digits := 0
	switch {
	case value < 10:
		digits = 2
	case value < 100:
		digits = 1
	}
	return strconv.FormatFloat(value, 'f', digits, 64) + " " + unit
}

// spanText writes a span of time as it is typed: 1h, and not 1h0m0s.
func spanText(d time.Duration) string {
	s := d.String()
	for _, nothing := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, nothing) {
			s = s[:len(s)-len(nothing)+1]
		}
	}
	return s
}

// timeText writes a time in UTC, to the second.
func timeText(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

// plural writes a number with its noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// orDash stands in for what there is not.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
