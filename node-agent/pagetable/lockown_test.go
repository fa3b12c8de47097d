package pagetable

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// What is locked is wholly in memory, though nobody has touched it.
func TestLockOwn(t *testing.T) {
	const length = 16 * 4096 // little enough for any RLIMIT_MEMLOCK
	path := filepath.Join(t.TempDir(), "mapped")
	if err := os.WriteFile(path, make([]byte, length), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, length, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b) //nolint:errcheck // it goes with the process else
	own := func() Mapping {
		mappings, err := Mappings(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mappings {
			if m.Path == path {
				return m
			}
		}
		t.Fatal("the file is not mapped")
		return Mapping{}
	}
	before := own()
	if before.Flags.Locked() || before.RSSBytes != 0 {
		t.Fatalf("before: %+v", before)
	}
	if err := before.LockOwn(); err != nil {
		t.Fatal(err)
	}
	if now := own(); !now.Flags.Locked() || now.LockedBytes != length || now.RSSBytes != length {
		t.Errorf("locked: %+v", now)
	}
	if err := (Mapping{Start: 4096, End: 8192}).LockOwn(); err == nil {
		t.Error("what is not mapped was locked")
	}
}
