package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// volatile is what differs from run to run: ids and digests.
var volatile = regexp.MustCompile(`\b[0-9a-f]{64}\b|\b[0-9a-f]{32}\b`)

// TestGolden pins what people read.
func TestGolden(t *testing.T) {
	s := family(t)
	golden := func(name, got string) {
		t.Helper()
		got = volatile.ReplaceAllStringFunc(got, func(id string) string {
			return fmt.Sprintf("%-*s", len(id), map[int]string{64: "(digest)", 32: "(id)"}[len(id)])
		})
		got = regexp.MustCompile(` +\n`).ReplaceAllString(got, "\n") // where a short word stands for a long id
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
			return
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got; -update writes it anew):\n%s", path, diff)
		}
	}
	golden("list", s.ok("list"))
	golden("show-base", s.ok("show", "web-1"))
	golden("show-increment", s.ok("show", "web-2"))

	s.flip(s.file("web-4", "manifest.json"), 100)
	if err := os.Truncate(s.file("db-1", "index"), 50); err != nil {
		t.Fatal(err)
	}
	s.ok("delete", "web-1")
	golden("list-damaged", s.ok("list"))
	empty := newShell(t)
	empty.ok("list")
}
