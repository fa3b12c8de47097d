package main

import (
	"strings"
	"testing"
	"time"

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
