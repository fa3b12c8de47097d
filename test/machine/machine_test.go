package machine

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/test/guest/writer"
)

// withTimeout bounds what a test waits for.
func withTimeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// TestWriterWorks starts the bare-metal guest on every QEMU, accelerator and kind of memory, and sees it write by vCPU and
// by DMA.
func TestWriterWorks(t *testing.T) {
	for _, version := range []Version{V72, V10} {
		for _, accel := range []Accel{TCG, KVM} {
			for _, memory := range []Memory{Private, Memfd, MemfdPrivate} {
				o := Options{QEMU: version, Accel: accel, Memory: memory}
				t.Run(o.String(), func(t *testing.T) {
					ctx := withTimeout(t, time.Minute)
					o.Guest = Writer{Percent: 50, Parameters: writer.Parameters{
						Random: true, PagesPerPass: 100, DMAPagesPerPass: 2,
					}}
					start := time.Now()
					m := Start(t, o)
					up := time.Since(start)
					status, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes >= 20 })
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("at work after %v; %+v after %v", up, status, time.Since(start))
					if status.Errors != 0 || status.Pages < 2000 || status.DMAPages < 40 {
						t.Errorf("the guest's account is %+v", status)
					}
					head := make([]byte, 4096)
					p := m.WriterParameters()
					written := false
					for page := range p.DMA.Pages {
						if err := m.ReadGuest(ctx, p.DMA.GPA+page*4096, head); err != nil {
							t.Fatal(err)
						}
						if head[0] != 0 || head[100] != 0 {
							written = true
							break
						}
					}
					if !written {
						t.Error("no page of the DMA range has been written")
					}
				})
			}
		}
	}
}

// TestWriterReachesHighMemory lays the guest's work over the hole that a PC has below 4 GiB, and over two RAM blocks.
func TestWriterReachesHighMemory(t *testing.T) {
	ctx := withTimeout(t, time.Minute)
	m := Start(t, Options{MemoryBytes: 4 * GiB, NUMANodes: 2, Guest: Writer{
		Parameters: writer.Parameters{Random: true, PagesPerPass: 1000},
	}})
	p := m.WriterParameters()
	if p.High.GPA != 4*GiB || p.High.Pages != 2*GiB/4096 {
		t.Fatalf("the guest writes %+v", p)
	}
	before, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Pages > 0 })
	if err != nil {
		t.Fatal(err)
	}
	// From here on only the last page of high memory is written.
	p.Low.Pages, p.High = 0, writer.Range{GPA: p.High.GPA + (p.High.Pages-1)*4096, Pages: 1}
	if err := m.SetWriterParameters(ctx, p); err != nil {
		t.Fatal(err)
	}
	if _, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > before.Passes+2 }); err != nil {
		t.Fatal(err)
	}
	word := make([]byte, 8)
	if err := m.ReadGuest(ctx, p.High.GPA, word); err != nil {
		t.Fatal(err)
	}
	if string(word) == string(make([]byte, 8)) {
		t.Error("the last page of high memory was never written")
	}
}

// TestWriterNotices that a page was changed behind its back: what makes it useful after a restore.
func TestWriterNotices(t *testing.T) {
	ctx := withTimeout(t, time.Minute)
	m := Start(t, Options{Guest: Writer{Parameters: writer.Parameters{
		Low: writer.Range{GPA: writer.FirstGPA, Pages: 1}, PagesPerPass: 1, Spin: 1000,
	}}})
	// Stopped between its check and its stores, which happens once in a few hundred times, the guest covers the change up.
	var status writer.Status
	for range 5 {
		if err := m.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		before, _, err := m.WriterStatus(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.WriteGuest(ctx, writer.FirstGPA, []byte("not what the guest wrote")); err != nil {
			t.Fatal(err)
		}
		if err := m.Continue(ctx); err != nil {
			t.Fatal(err)
		}
		status, err = m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > before.Passes+1 })
		if err != nil {
			t.Fatal(err)
		}
		if status.Errors > 0 {
			break
		}
	}
	if status.Errors == 0 {
		t.Fatalf("a page was changed five times and the guest noticed nothing: %+v", status)
	}
	if status.ErrorGPA != writer.FirstGPA {
		t.Errorf("the guest found the fault at %#x", status.ErrorGPA)
	}
}

// TestPausedStandsStill until it is told to go on, as a machine must that is restored into.
func TestPausedStandsStill(t *testing.T) {
	ctx := withTimeout(t, time.Minute)
	m := Start(t, Options{Paused: true, Guest: Writer{}})
	if _, begun, err := m.WriterStatus(ctx); err != nil || begun {
		t.Fatalf("before cont: begun %v, error %v", begun, err)
	}
	if err := m.Continue(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Ready(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestCloseLeavesNothing: neither process nor directory.
func TestCloseLeavesNothing(t *testing.T) {
	m := Start(t, Options{Guest: Writer{}})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Exited():
	default:
		t.Error("QEMU has not ended")
	}
	if _, err := os.Stat(m.Dir()); !os.IsNotExist(err) {
		t.Errorf("the machine's directory: %v", err)
	}
}
