package main

import (
	"strings"
	"testing"
)

// TestListUnreadableParent: a parent whose manifest is damaged is not said to be gone.
func TestListUnreadableParent(t *testing.T) {
	s := family(t)
	s.flip(s.file("web-2", "manifest.json"), 100)
	s.ok("delete", "web-3")
	s.write("web-3", "", 6, 0, 3)
	notes := map[string]string{}
	for _, row := range strings.Split(s.ok("list"), "\n") {
		if name, note, found := strings.Cut(row, "its parent "); found {
			notes[strings.Fields(name)[0]] = note
		}
	}
	want := map[string]string{
		"web-3b": "web-2 cannot be read",
		"web-4":  "web-3 is not here, another has its name",
	}
	for name, note := range want {
		if notes[name] != note {
			t.Errorf("%s: %q, want %q", name, notes[name], note)
		}
	}
	if len(notes) != len(want) {
		t.Errorf("notes: %q", notes)
	}
}
