package faultyfs

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func TestFaults(t *testing.T) {
	f := Mount(t)
	write := func() error { return os.WriteFile(filepath.Join(f.Dir, "file"), []byte("text"), 0o600) }
	for _, c := range []struct {
		fault Fault
		want  error
	}{{None, nil}, {EIO, syscall.EIO}, {Full, syscall.ENOSPC}, {ReadOnly, syscall.EROFS}, {Slow, nil}, {None, nil}} {
		f.Set(c.fault)
		if err := write(); !errors.Is(err, c.want) {
			t.Errorf("%q: error %v, want %v", c.fault, err, c.want)
		}
	}
	f.Set(Hangs)
	done := make(chan error, 1)
	go func() { done <- write() }()
	select {
	case err := <-done:
		t.Fatalf("a write to a volume that hangs: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	met := f.Set(None)
	if err := <-done; err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(filepath.Join(f.Dir, "file"))
	if err != nil || string(text) != "text" {
		t.Errorf("the file holds %q, %v", text, err)
	}
	if met == 0 {
		t.Error("no change has met a fault")
	}
}
