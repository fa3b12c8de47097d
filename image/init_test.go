package image

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// fill makes files, and directories where a name ends with a slash.
func fill(t *testing.T, dir string, list []string) {
	t.Helper()
	for _, name := range list {
		path := filepath.Join(dir, name)
		at, content := filepath.Dir(path), []byte(filepath.Base(path))
		if strings.HasSuffix(name, "/") {
			at = path
		}
		if strings.HasSuffix(path, lockName) {
			content = nil
		}
		err := os.MkdirAll(at, 0o700)
		if at != path {
			err = errors.Join(err, os.WriteFile(path, content, 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// everything lists what is beneath a directory.
func everything(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, _ fs.DirEntry, err error) error {
		list = append(list, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestInitLeavesOthersAlone: a directory with anything in it does not become a repository, and stays as it was.
func TestInitLeavesOthersAlone(t *testing.T) {
	for first, list := range map[string][]string{
		".bashrc":                {"tmp/", ".bashrc", "work/"},
		"images/holiday":         {"images/holiday/", "lock"},
		"images/a":               {"images/b", "images/a"},
		"tmp/file":               {"tmp/repository.json", "tmp/file"},
		"tmp/0123":               {"tmp/0123/"},
		"lock":                   {"lock/"},
		"locks":                  {"locks"},
		"images":                 {"images"},
		"tmp":                    {"tmp"},
		"lost+found":             {"lost+found"}, // which is a directory where it is a volume's
		"repository.json.backup": {"repository.json.backup"},
	} {
		dir := t.TempDir()
		fill(t, dir, list)
		before := everything(t, dir)
		err := InitRepository(dir)
		var typed *NotEmptyError
		if !errors.As(err, &typed) || typed.Name != first || !strings.Contains(err.Error(), "sub-directory") {
			t.Errorf("%v: %v, want one that names %s", list, err, first)
		}
		if after := everything(t, dir); !slices.Equal(before, after) {
			t.Errorf("before %v, after %v", before, after)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, lockName), []byte("a lock of something else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if typed := new(NotEmptyError); !errors.As(InitRepository(dir), &typed) {
		t.Error("a lock with something in it was taken for ours")
	}
}

// TestInitAgain: what an init leaves that was killed does not keep the next one, nor does what a volume has by nature.
func TestInitAgain(t *testing.T) {
	for _, list := range [][]string{
		{"lock"}, {"images/"}, {"lock", "images/", "tmp/"}, {"lock", "images/", "tmp/repository.json"},
		{"lost+found/#1234"}, {".snapshot/", ".zfs/", "lost+found/"},
	} {
		dir := t.TempDir()
		fill(t, dir, list)
		if err := InitRepository(dir); err != nil {
			t.Errorf("%v: %v", list, err)
			continue
		}
		r, err := OpenRepository(dir, testKeys(false))
		if err != nil {
			t.Fatal(err)
		}
		mustSeal(t, r, Spec{Name: "image", Blocks: someBlocks})
		if left, err := r.Leftovers(t.Context()); err != nil || len(left) > 0 {
			t.Errorf("%v: left over: %v, %v", list, left, err)
		}
		r.Close()
		if err := InitRepository(dir); !errors.Is(err, ErrExists) {
			t.Errorf("%v: once more: %v", list, err)
		}
	}
}

// TestInitNoDirectory names a file, and something beneath one.
func TestInitNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "a", "b")} {
		if err := InitRepository(dir); !errors.Is(err, ErrNotDirectory) || !strings.Contains(err.Error(), file+" is not a directory") {
			t.Errorf("make %s: %v", dir, err)
		}
		if _, err := OpenRepository(dir, testKeys(false)); !errors.Is(err, ErrNotDirectory) {
			t.Errorf("open %s: %v", dir, err)
		}
	}
}

// TestInitFaults fails every call to the file system, one after the other, and everything after it.
func TestInitFaults(t *testing.T) {
	for n := 1; ; n++ {
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		failing := &faultyDisk{disk: rootDisk{root}, fail: n, err: syscall.ENOSPC}
		var d disk = failing
		if n == 6 {
			// The last: what follows it, taking the repository back, succeeds.
			failing.fail = 0
			d = &hookedDisk{disk: failing, sync: func(string) error { return syscall.ENOSPC }}
		}
		err = initIn(root, d, rand.Reader)
		if failing.fail > failing.calls {
			if n != 7 || err != nil {
				t.Errorf("call %d: %v", n, err)
			}
			break
		}
		if space := new(SpaceError); !errors.As(err, &space) {
			t.Errorf("call %d: %v", n, err)
		}
		if err := InitRepository(dir); err != nil {
			t.Errorf("call %d, and once more: %v", n, err)
		}
	}
}
