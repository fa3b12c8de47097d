package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

func TestSizes(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 1 << 20: "1.0 MiB", 3 << 29: "1.5 GiB", 1<<30 - 1: "1.0 GiB", 1 << 60: "1024.0 PiB",
	} {
		if got := sizeText(bytes); got != want {
			t.Errorf("%d bytes: %q, want %q", bytes, got, want)
		}
	}
}

func TestCounts(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 262144: "262,144", 1234567: "1,234,567"} {
		if got := countText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestDurations(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 s", 1500 * time.Nanosecond: "1.50 µs", 999 * time.Microsecond: "999 µs", 6700 * time.Microsecond: "6.70 ms",
		12345 * time.Microsecond: "12.3 ms", 1234 * time.Millisecond: "1.23 s", 125 * time.Second: "2m5s",
	} {
		if got := durationText(d); got != want {
			t.Errorf("%d ns: %q, want %q", d, got, want)
		}
	}
}

func TestSpans(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", time.Hour: "1h", 90 * time.Minute: "1h30m", 10 * time.Minute: "10m", 30 * time.Second: "30s", 20*time.Hour + time.Second: "20h0m1s",
	} {
		if got := spanText(d); got != want {
			t.Errorf("%d ns: %q, want %q", d, got, want)
		}
	}
}

// TestTypedWrong names the command whose help there is to read.
func TestTypedWrong(t *testing.T) {
	s := newShell(t)
	for _, c := range []struct{ args, message, hint string }{
		{"capture --nonsense", "unknown flag: --nonsense", "`vmckpt capture --help`"},
		{"capture", "which machine?", "`vmckpt capture --help`"},
		{"capture a b", `"b" is one argument too many`, "`vmckpt capture --help`"},
		{"restore", "IMAGE is missing", "`vmckpt restore --help`"},
		{"show a/b", "image name", "`vmckpt show --help`"},
		{"lst", `unknown command "lst" for "vmckpt" Did you mean this? list`, "`vmckpt --help`"},
	} {
		stdout, stderr, exit := s.run(strings.Fields(c.args)...)
		if exit != exitUsage || stdout != "" || strings.Count(stderr, "\n") != 2 || !strings.Contains(stderr, c.message) || !strings.Contains(stderr, c.hint) {
			t.Errorf("%s: exit code %d, answer %q, standard error:\n%s", c.args, exit, stdout, stderr)
		}
	}
}

// TestImageName gives names that a repository takes, whatever the machine is called.
func TestImageName(t *testing.T) {
	for guest, want := range map[string]string{
		"web":              "web-20260102t030405.000z",
		"default_VM.1":     "default-vm.1-20260102t030405.000z",
		"":                 "pid-7-20260102t030405.000z",
		"../../etc":        "etc-20260102t030405.000z",
		"größe":            "gr--e-20260102t030405.000z",
		"日本":               "pid-7-20260102t030405.000z",
		long(200):          long(107) + "-20260102t030405.000z",
		long(106) + "-bbb": long(106) + "-20260102t030405.000z",
	} {
		got := imageName(&qemu.Process{PID: 7, Guest: guest}, zeroTime)
		if got != want {
			t.Errorf("%q: %q, want %q", guest, got, want)
		}
		if err := image.CheckName(got); err != nil {
			t.Error(err)
		}
	}
}

func long(n int) string { return strings.Repeat("a", n) }

func TestLibvirtSocket(t *testing.T) {
	for from, want := range map[string]string{
		"/run/libvirt/libvirt-sock":               "/run/libvirt/libvirt-sock",
		"qemu:///session":                         "", // no XDG_RUNTIME_DIR
		"qemu+unix:///system?socket=/elsewhere":   "/elsewhere",
		"qemu:///embed":                           "",
		"qemu+ssh://host/system":                  "",
		"qemu+unix://host/system?socket=/run/one": "",
		"xen:///system":                           "",
	} {
		got, err := libvirtSocket(from, func(string) string { return "" })
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v, want %q", from, got, err, want)
		}
	}
}

// TestTree draws forks and chains.
func TestTree(t *testing.T) {
	at := func(minute int, name string, parent *node) *node {
		n := &node{Summary: image.Summary{Name: name, Manifest: image.Manifest{Created: zeroTime.Add(time.Duration(minute) * time.Minute)}}, parent: parent}
		if parent != nil {
			parent.children = append(parent.children, n)
		}
		return n
	}
	base := at(0, "base", nil)
	one := at(1, "one", base)
	two := at(2, "two", one)
	left := at(3, "left", two)
	at(4, "left-on", left)
	right := at(5, "right", two)
	at(7, "right-b", at(6, "right-a", right))
	lone := at(8, "lone", nil)
	var got strings.Builder
	for _, l := range draw([]*node{base, lone}) {
		got.WriteString(l.branches + l.Name + "\n")
	}
	want := `base
└─ one
   two
   ├─ left
   │  left-on
   └─ right
      right-a
      right-b
lone
`
	if got.String() != want {
		t.Errorf("got:\n%swant:\n%s", got.String(), want)
	}
}

// TestInterruptedSaysAllThatIsKnown keeps what an error says beside the interruption.
func TestInterruptedSaysAllThatIsKnown(t *testing.T) {
	var stderr strings.Builder
	p := &program{stderr: &stderr}
	p.complain(errors.Join(context.Canceled, errors.New("and the volume is gone")))
	if got := stderr.String(); got != "interrupted: it was asked to end\n             and the volume is gone\n" {
		t.Errorf("%q", got)
	}
}
