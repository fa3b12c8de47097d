//go:build linux

package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nfsDisk removes as NFS does: a file that this process has open stays, and with it the directory. What NFS asks of locks,
// tryLock asks everywhere.
type nfsDisk struct {
	disk
	path string // of the repository
}

func (d nfsDisk) removeAll(name string) error {
	path := filepath.Join(d.path, name)
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, fd := range list {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && (target == path || strings.HasPrefix(target, path+"/")) {
			if info, err := os.Stat("/proc/self/fd/" + fd.Name()); err == nil && info.Mode().IsRegular() {
				return fmt.Errorf("remove %s: %s is open: %w", name, target, syscall.ENOTEMPTY)
			}
		}
	}
	return d.disk.removeAll(name)
}

// TestOnNFS makes, gives up, deletes and sweeps on a volume that wants what NFS wants.
func TestOnNFS(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	r.disk = nfsDisk{r.disk, r.path}
	empty := func(when string) {
		t.Helper()
		if left, err := names(r.root, temporaryDir); err != nil || len(left) > 0 {
			t.Errorf("left over %s: %v, %v", when, left, err)
		}
	}
	i := mustSeal(t, r, Spec{Name: "image", Blocks: someBlocks})
	empty("by Seal")

	w, err := r.Create(ctx, Spec{Name: "child", Parent: i, Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Error(err)
	}
	empty("by Abort")

	dead, err := r.Create(ctx, Spec{Name: "dead", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	living, err := r.Create(ctx, Spec{Name: "living", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	defer living.Abort()
	for _, f := range []interface{ Close() error }{dead.data.file, dead.hashes.out.file, dead.alive} {
		f.Close() // as the kernel does for a process that was killed
	}
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) != 1 || removed[0] != dead.dir {
		t.Errorf("swept %v, %v", removed, err)
	}

	// A reader does not keep an image in sight; it keeps some of its files until Sweep comes by.
	if err := r.Delete(ctx, "image"); err != nil {
		t.Error(err)
	}
	if _, err := r.Open(ctx, "image"); !errors.Is(err, ErrNotFound) {
		t.Errorf("open what was deleted: %v", err)
	}
	i.Close()
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) != 1 {
		t.Errorf("swept %v, %v", removed, err)
	}
	mustSeal(t, r, Spec{Name: "other", Blocks: someBlocks}).Close()
	if err := r.Delete(ctx, "other"); err != nil {
		t.Error(err)
	}
	if err := living.Abort(); err != nil {
		t.Error(err)
	}
	empty("by Delete")
}

// TestSweepSaysWhatItCannotTell: a leftover whose lock cannot be asked for stays, is an error, and does not keep the others.
func TestSweepSaysWhatItCannotTell(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	for _, name := range []string{"a", "b", "c"} {
		if err := os.Mkdir(filepath.Join(r.path, temporaryDir, strings.Repeat(name, 32)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Nobody opens for writing what is being executed.
	busy := filepath.Join(r.path, temporaryDir, strings.Repeat("b", 32), aliveName)
	code, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Skip("no program to run:", err)
	}
	if err := os.WriteFile(busy, code, 0o700); err != nil {
		t.Fatal(err)
	}
	program := exec.Command(busy, "600")
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	defer program.Wait()
	defer program.Process.Kill()
	removed, err := r.Sweep(ctx, -time.Hour)
	if !errors.Is(err, syscall.ETXTBSY) || len(removed) != 2 {
		t.Errorf("swept %v, %v", removed, err)
	}
	program.Process.Kill()
	program.Wait()
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) != 1 {
		t.Errorf("swept %v, %v", removed, err)
	}
}
