package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestMeters(t *testing.T) {
	for _, c := range []struct {
		style    progressStyle
		terminal bool
		output   outputFormat
		want     meter
	}{
		{progressAuto, true, outputText, &barMeter{}},
		{progressAuto, true, outputJSON, noMeter{}},
		{progressAuto, false, outputText, noMeter{}},
		{progressPlain, true, outputJSON, &plainMeter{}},
		{progressBar, false, outputText, &barMeter{}},
		{progressNone, true, outputText, noMeter{}},
	} {
		p := &program{progress: c.style, terminal: c.terminal, output: c.output}
		got := p.meter()
		if name(got) != name(c.want) {
			t.Errorf("%+v: %T", c, got)
		}
	}
}

func name(m meter) string {
	switch m.(type) {
	case *barMeter:
		return "bar"
	case *plainMeter:
		return "plain"
	}
	return "none"
}

func TestPlainProgress(t *testing.T) {
	var out strings.Builder
	now := zeroTime
	m := &plainMeter{w: &out, now: func() time.Time { return now }}
	m.at("preparing", 0, 0)
	m.at("copying", 0, 1<<30)
	m.at("copying", 1<<28, 1<<30)
	now = now.Add(6 * time.Second)
	m.at("copying", 1<<29, 1<<30)
	m.at("sealing", 0, 0)
	m.end()
	want := `preparing
copying: 0 B of 1.0 GiB (0 %)
copying: 512.0 MiB of 1.0 GiB (50 %)
sealing
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestBarFits looks that no line of a bar wraps.
func TestBarFits(t *testing.T) {
	for _, columns := range []int{20, 40, 60, 70, 80, 120} {
		var out strings.Builder
		m := &barMeter{w: &out, columns: func() int { return columns }}
		for _, total := range []int64{0, 1000 << 30} {
			for _, phase := range []string{"copying", "[10/12] verifying a-machine-with-a-very-long-name-20260102t030405.678z"} {
				m.at(phase, 0, total)
				time.Sleep(110 * time.Millisecond) // it draws no more often
				m.at(phase, 999<<30, total)
			}
		}
		m.end()
		for _, line := range strings.FieldsFunc(out.String(), func(r rune) bool { return r == '\r' || r == '\n' }) {
			if n := utf8.RuneCountInString(line); n >= columns && strings.TrimSpace(line) != "" {
				t.Errorf("%d columns on a terminal of %d: %q", n, columns, line)
			}
		}
		if columns >= 60 && !strings.Contains(out.String(), "05.678z") {
			t.Errorf("%d columns: the label's end is not there", columns)
		}
	}
}

// TestBarLeavesNothing looks at what a terminal shows in the end.
func TestBarLeavesNothing(t *testing.T) {
	var out strings.Builder
	m := &barMeter{w: &out}
	m.at("preparing", 0, 0)
	m.at("copying", 10, 100)
	m.at("copying", 100, 100)
	m.at("sealing", 0, 0)
	m.end()
	if s := out.String(); !strings.HasSuffix(s, "\r") || !strings.Contains(s, "copying") {
		t.Errorf("the terminal got %q", s)
	}
}
