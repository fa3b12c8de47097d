package machine

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// TestLibvirt starts the Linux guest as a domain of a private libvirt, kills it, and starts its twin standing still.
func TestLibvirt(t *testing.T) {
	for _, version := range []Version{V72, V10} {
		t.Run(string(version), func(t *testing.T) {
			ctx := withTimeout(t, 2*time.Minute)
			start := time.Now()
			l := StartLibvirt(t)
			t.Logf("libvirt answers after %v", time.Since(start))
			m := l.Start(t, Options{QEMU: version, MemoryBytes: 512 * MiB, FreePageReporting: true, Net: true, Disk: &Disk{},
				Guest: Linux{Loads: []Load{Counter, DMA}}})
			t.Logf("at work after %v", time.Since(start))
			c, err := m.DialChannel(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.Work(ctx, 1); err != nil {
				t.Fatal(err)
			}
			if state, err := c.State(ctx); err != nil || !state.OK {
				t.Fatalf("state %v, error %v", state, err)
			}
			if status, err := qemu.Status(ctx, m.Monitor); err != nil || status != qemu.StateRunning {
				t.Errorf("run state %v, error %v", status, err)
			}
			// The product finds the way through the process itself.
			p, err := qemu.Find(ctx, qemu.Selector{Guest: m.Options().Name})
			if err != nil {
				t.Fatal(err)
			}
			monitor, err := qemu.DialProcess(ctx, p, qemu.DialOptions{})
			if err != nil {
				t.Fatal(err)
			}
			monitor.Close()
			if err := m.Kill(); err != nil {
				t.Fatal(err)
			}
			twin := l.Start(t, m.Twin())
			if status, err := qemu.Status(ctx, twin.Monitor); err != nil || status == qemu.StateRunning {
				t.Errorf("the twin's run state %v, error %v", status, err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", twin.PID)); err == nil {
				t.Error("the twin's QEMU outlived libvirt")
			}
		})
	}
}
