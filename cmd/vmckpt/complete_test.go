package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestComplete asks for what a shell offers behind what was typed; it asks in the same way.
func TestComplete(t *testing.T) {
	s := family(t)
	images := []string{"db-1", "web-1", "web-2", "web-3", "web-3b", "web-4"}
	for _, c := range []struct {
		typed string
		want  []string
	}{
		{"show", images},
		{"show web-1", nil},
		{"restore", images},
		{"verify db-1", images[1:]},
		{"delete db-1 web-1", images[2:]},
		{"capture --parent", images},
		{"capture --mode", []string{"auto", "full", "incremental"}},
		{"capture --compression", []string{"none", "s2", "zstd"}},
		{"list --output", []string{"json", "text"}},
		{"show --repo /nowhere", nil},
	} {
		stdout, _, exit := s.run(append([]string{"__complete"}, append(strings.Fields(c.typed), "")...)...)
		var got []string
		for line := range strings.Lines(stdout) {
			if line = strings.TrimSpace(line); !strings.HasPrefix(line, ":") {
				got = append(got, line)
			}
		}
		if diff := cmp.Diff(c.want, sorted(got)); diff != "" || exit != 0 || !strings.HasSuffix(stdout, ":4\n") { // no files
			t.Errorf("%s: exit code %d, (-want +got):\n%s%s", c.typed, exit, diff, stdout)
		}
	}
}

// TestCompleteLeavesOut what a shell would act upon: others name machines.
func TestCompleteLeavesOut(t *testing.T) {
	got := within(t.Context(), words("web", "a\tdescription", "two\nlines", "\x1b[2J"))
	if diff := cmp.Diff([]string{"web"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func sorted(all []string) []string {
	slices.Sort(all)
	return all
}
