package dirty

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestBusy looks at a lock: it changes nothing, and is in nobody's way.
func TestBusy(t *testing.T) {
	dir, p := t.TempDir(), Process{PID: 4711, StartTime: 1}
	for _, where := range []string{dir, filepath.Join(dir, "nowhere")} {
		if err := Busy(where, p); err != nil {
			t.Errorf("nobody had it ever: %v", err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("a look has left %v, %v", left, err)
	}
	var looking sync.WaitGroup
	defer looking.Wait()
	quit := make(chan struct{})
	defer close(quit)
	looking.Go(func() {
		for {
			select {
			case <-quit:
				return
			default:
				Busy(dir, p) //nolint:errcheck // it is had now and then
			}
		}
	})
	for range 200 {
		lock, err := Lock(dir, p)
		if err != nil {
			t.Fatalf("while somebody looks: %v", err)
		}
		busy := new(BusyError)
		if err := Busy(dir, p); !errors.As(err, &busy) || busy.Holder != os.Getpid() {
			t.Errorf("while it is had: %v", err)
		}
		lock.Close()
	}
	if err := Busy(dir, p); err != nil {
		t.Errorf("let go: %v", err)
	}
}
