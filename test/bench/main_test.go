package main

import "testing"

func TestChoose(t *testing.T) {
	for list, want := range map[string]int{"": len(suites), "qemu": 1, "qemu, increment": 2, "nonsense": -1, "qemu,nonsense": -1, "qemu,": -1} {
		got, err := choose(list)
		if len(got) != max(0, want) || (err != nil) != (want < 0) {
			t.Errorf("%q: %d suites, %v", list, len(got), err)
		}
	}
}

func TestVersion(t *testing.T) {
	for release, want := range map[string]string{"6.12.0": "6.12.0", "6.1.0-37-cloud-amd64": "6.1.0", "5.10.x": "5.10", "6.18.44+": "6.18.44"} {
		if got := version(release); got != want {
			t.Errorf("%s: %s, want %s", release, got, want)
		}
	}
}
