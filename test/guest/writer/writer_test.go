package writer

import (
	"errors"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestROM(t *testing.T) {
	cache := t.TempDir()
	p := Parameters{Low: Range{FirstGPA, 100}, PagesPerPass: 7, Random: true, Whole: true, Seed: 3, MapGiB: 1}
	rom, err := ROM(t.Context(), cache, p)
	if errors.Is(err, exec.ErrNotFound) {
		t.Skipf("GNU as and ld are needed (hack/setup build): %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(rom) != romBytes {
		t.Fatalf("the ROM has %d bytes, not %d", len(rom), romBytes)
	}
	// The reset vector is a near jump (e9) 16 bytes below the end.
	if got := rom[romBytes-16]; got != 0xe9 {
		t.Errorf("the reset vector begins with %#x, not with a near jump", got)
	}
	want := p.Bytes()
	if diff := cmp.Diff(want, rom[romParametersOff:romParametersOff+len(want)]); diff != "" {
		t.Errorf("parameters in the ROM (-want +got):\n%s", diff)
	}
	again, err := ROM(t.Context(), cache, p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(rom, again); diff != "" {
		t.Errorf("the kept ROM differs (-first +second):\n%s", diff)
	}
}

func TestParseStatus(t *testing.T) {
	b := make([]byte, StatusBytes)
	if _, begun := ParseStatus(b); begun {
		t.Error("memory of zeros is taken for a guest that has begun")
	}
	copy(b, magic)
	b[0x40], b[0x48], b[0x50] = 6, 7, 8
	b[0x08], b[0x10], b[0x18], b[0x20], b[0x28], b[0x38] = 1, 2, 3, 4, 5, 1
	got, begun := ParseStatus(b)
	if !begun {
		t.Fatal("the guest has begun, and is taken not to have")
	}
	want := Status{Passes: 1, Pages: 2, Errors: 3, ErrorGPA: 4, DMAPages: 5, DMAReady: true, Clock: 6, Gap: 7, Epoch: 8}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}
