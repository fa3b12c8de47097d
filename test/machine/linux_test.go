package machine

import (
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
)

// TestLinuxWorks boots the Linux guest with all its loads on each QEMU and kernel, and sees each of them get on.
func TestLinuxWorks(t *testing.T) {
	for _, tt := range []struct {
		options Options
		kernel  Kernel
	}{
		{Options{QEMU: V72, Memory: Private}, KernelBookworm},
		{Options{QEMU: V10, Memory: Memfd}, KernelBackports},
		{Options{QEMU: V10, Accel: KVM}, KernelBackports},
	} {
		o := tt.options
		t.Run(o.String()+"-"+string(tt.kernel), func(t *testing.T) {
			ctx := withTimeout(t, 2*time.Minute)
			o.MemoryBytes = 512 * MiB
			o.FreePageReporting = true
			o.Disk = &Disk{IOThread: true}
			o.Net = true
			l := Linux{Kernel: tt.kernel, Loads: []Load{Counter, DMA, Net, Alloc, Stress}}
			o.Guest = l
			start := time.Now()
			m := Start(t, o)
			t.Logf("at work after %v", time.Since(start))
			from := 0
			for _, prefix := range []string{"dma: ", "net: ", "alloc: ", "stress: "} {
				line, _, err := m.Serial.WaitLine(ctx, 0, func(line string) bool { return strings.HasPrefix(line, prefix) })
				if err != nil {
					t.Fatal(err)
				}
				t.Log(line)
			}
			for range 3 {
				line, at, err := m.Serial.WaitLine(ctx, from, func(line string) bool {
					_, ok := workload.ParseState(line)
					return ok
				})
				if err != nil {
					t.Fatal(err)
				}
				from = at + 1
				state, _ := workload.ParseState(line)
				if want := l.Counter().Hash(state.Count); !state.OK || state.Hash != want {
					t.Errorf("the guest says %q, and the hash of that count is %016x", line, want)
				}
			}
			c, err := m.DialChannel(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.Work(ctx, 10); err != nil {
				t.Fatal(err)
			}
			state, err := c.State(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if want := l.Counter().Hash(state.Count); !state.OK || state.Hash != want {
				t.Errorf("the guest says %v on its channel, and the hash of that count is %016x", state, want)
			}
			lines, err := m.Serial.Lines()
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range lines {
				if strings.Contains(line, "CORRUPT") || strings.Contains(line, "init: ") && !strings.HasPrefix(line, "init: ready") {
					t.Errorf("the guest says: %s", line)
				}
			}
		})
	}
}
