package main

import (
	"os"
	"strings"
	"testing"

	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// TestDisksNamed captures, shows and restores a machine with a disk that the guest can write.
func TestDisksNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not available here: root")
	}
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Disk: &machine.Disk{}, Guest: machine.Writer{
		Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, Spin: 100_000},
	}})
	goesOn(t, m)
	says := func(what string, warnings []string) {
		t.Helper()
		if len(warnings) != 1 || !strings.Contains(warnings[0], "not part of the image") || !strings.Contains(warnings[0], "is writable") {
			t.Errorf("%s: warnings %q", what, warnings)
		}
	}
	says("capture", process[captureJSON](s, records, 0, "capture", m.Options().Name, "--name", "base").Warnings)
	says("restore", process[restoreJSON](s, records, 0, "restore", "base", m.Options().Name, "--in-place", "--run").Warnings)
	if got := s.ok("show", "base"); !strings.Contains(got, "not part of the image: ") {
		t.Errorf("show:\n%s", got)
	}
}
