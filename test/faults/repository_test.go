package faults

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestVolumeFull lets the volume run full in the middle.
func TestVolumeFull(t *testing.T) {
	larger := options()
	larger.MemoryBytes = 64 * machine.MiB
	b := truth.NewBench(t, larger)
	small := t.TempDir()
	if err := unix.Mount("none", small, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("mounting a small volume: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) }) //nolint:errcheck // it goes with the machine else
	dir := filepath.Join(small, "repository")
	if err := image.InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	full, err := image.OpenRepository(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Machine.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > 40_000 }); err != nil {
		t.Fatal(err)
	}
	o := b.Options()
	o.Compression = image.None
	_, err = capture.Run(t.Context(), b.Target, full, o)
	var space *image.SpaceError
	if !errors.As(err, &space) {
		t.Errorf("error %v, want that the volume is full", err)
	}
	for _, where := range []string{"tmp", "images"} {
		if left, err := os.ReadDir(filepath.Join(dir, where)); err != nil || len(left) > 0 {
			t.Errorf("left in %s of the full volume: %v, %v", where, left, err)
		}
	}
	sound(t, b)
}

// TestParentGone deletes or damages the image that the next one was to be made on.
func TestParentGone(t *testing.T) {
	for _, c := range []struct {
		name   string
		verify bool // only a look at every byte finds it
		damage func(t *testing.T, dir string)
	}{
		{"deleted", false, func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}},
		{"manifest", false, func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "manifest.json"), 100) }},
		{"index", false, func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "index"), 100) }},
		{"pages cut short", false, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.pages"))
			if err != nil || len(files) == 0 {
				t.Fatalf("data files %v, %v", files, err)
			}
			if err := os.Truncate(files[0], 1000); err != nil {
				t.Fatal(err)
			}
		}},
		// Found when the first page is compared with it, with the machine's instant over.
		{"hashes", false, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.hashes"))
			if err != nil || len(files) == 0 {
				t.Fatalf("hash files %v, %v", files, err)
			}
			content, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			for at := 100; at < len(content); at += 1000 {
				flip(t, files[0], at)
			}
		}},
		{"a page", true, func(t *testing.T, dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "*.pages"))
			if err != nil || len(files) == 0 {
				t.Fatalf("data files %v, %v", files, err)
			}
			flip(t, files[0], 70_000)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := truth.NewBench(t, options())
			b.Capture(t.Context(), b.Options())
			c.damage(t, filepath.Join(b.Dir, "images", b.Names[0]))

			o := b.Options()
			o.Mode, o.VerifyParent = capture.Incremental, c.verify
			if _, err := capture.Run(t.Context(), b.Target, b.Repository, o); err == nil {
				t.Error("an increment was made on a parent that is gone")
			}
			o = b.Options()
			o.VerifyParent = c.verify
			result, img := b.Capture(t.Context(), o)
			b.Judge(t.Context(), result, img)
			if err := img.Verify(t.Context(), nil); err != nil {
				t.Error(err)
			}
			t.Logf("%s", result.Why)
			if result.Parent != "" || !strings.HasPrefix(result.Why, "a base") {
				t.Errorf("parent %q, why %q; want a base that says why it is one", result.Parent, result.Why)
			}
			result, img = b.Capture(t.Context(), b.Options())
			b.Judge(t.Context(), result, img)
			if result.Source != "page tables" {
				t.Errorf("the one after it is by %q: %s", result.Source, result.Why)
			}
		})
	}
}

func flip(t *testing.T, file string, at int) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(content)
	changed[at] ^= 1
	if err := os.WriteFile(file, changed, 0o600); err != nil {
		t.Fatal(err)
	}
}
