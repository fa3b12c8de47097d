package truth

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// onGuard are the options of a base with all its memory on a guard; act is called when the instant is over and nothing is copied yet.
func (b *bench) onGuard(act func()) capture.Options {
	o := b.Options()
	o.Mode, o.Instant, o.ResidueBudget = capture.Full, capture.Early, time.Microsecond
	o.Hooks.Step = func(at capture.Step) {
		if at == capture.StepConfirmed {
			act()
		}
	}
	return o
}

// TestGivenBackBehindGuard has a balloon take memory after the instant, before it is copied. It gets none that is guarded: the image has it
// as it was. Afterwards memory can be given back again.
func TestGivenBackBehindGuard(t *testing.T) {
	for _, c := range linux() {
		o := c.options
		if !o.FreePageReporting || o.Memory != machine.Private {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, o)
			ctx := t.Context()
			b.account() // it is up
			b.Capture(ctx, b.Options())
			before := memlock(t, b.Machine.PID)
			taken := o.MemoryBytes / 8
			result, img := b.Capture(ctx, b.onGuard(func() {
				if locked(t, b.Machine.PID) == 0 {
					t.Error("nothing is kept from being given back")
				}
				b.setBalloon(ctx, o.MemoryBytes-taken)
				b.balloonIs(ctx, o.MemoryBytes-taken)
			}))
			b.Judge(ctx, result, img)
			if result.Attempts != 1 || result.Guard == nil {
				t.Errorf("it took %d attempts: %+v, %q", result.Attempts, result.Guard, result.Lost)
			}
			if after := memlock(t, b.Machine.PID); after != before {
				t.Errorf("the limit on locked memory was %v, and is %v", before, after)
			}
			if n := locked(t, b.Machine.PID); n != 0 {
				t.Errorf("%d bytes are locked still", n)
			}
			b.setBalloon(ctx, o.MemoryBytes)
			b.balloonIs(ctx, o.MemoryBytes)
			b.setBalloon(ctx, o.MemoryBytes-taken)
			b.balloonIs(ctx, o.MemoryBytes-taken)
			b.instant(ctx, ordinary)
			if absent, want := b.absent(ctx), taken/pageset.PageBytes/2; absent < want {
				t.Errorf("the balloon took %d pages, and the image has content for all but %d", taken/pageset.PageBytes, absent)
			}
		})
	}
}

// locked is how much of a process's memory is locked.
func locked(t *testing.T, pid int) (bytes uint64) {
	t.Helper()
	mappings, err := pagetable.Mappings(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mappings {
		if m.Flags.Locked() {
			bytes += m.Bytes()
		}
	}
	return bytes
}

// memlock is a process's limit on locked memory.
func memlock(t *testing.T, pid int) unix.Rlimit {
	t.Helper()
	var l unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, nil, &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// alone says that nothing else is tested on this machine meanwhile, so that the kernel's settings may be changed for all of it.
var alone = flag.Bool("alone", false, "change settings of the whole machine as well")

// TestMergedBehindGuard has KSM look for equal pages as hard as it can while memory is guarded.
func TestMergedBehindGuard(t *testing.T) {
	if !*alone {
		t.Skip("KSM is the whole machine's: it is switched on with -alone")
	}
	const ksm = "/sys/kernel/mm/ksm/"
	old := map[string]string{}
	for _, name := range []string{"run", "sleep_millisecs", "pages_to_scan"} {
		text, err := os.ReadFile(ksm + name)
		if err != nil {
			t.Skipf("this kernel has no KSM: %v", err)
		}
		old[name] = strings.TrimSpace(string(text))
	}
	set := func(name, value string) {
		t.Helper()
		if err := os.WriteFile(ksm+name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for name, value := range old {
			set(name, value)
		}
	})
	// Half of what the guest writes are uniform pages, of which there are many that are equal.
	o := machine.Options{QEMU: machine.V10, Accel: machine.TCG, MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{
		Percent: 60, Parameters: writer.Parameters{Random: true, Uniform: true, PagesPerPass: 16, Spin: 1_000_000},
	}}
	b := newBench(t, o)
	ctx := t.Context()
	b.Capture(ctx, b.Options())
	set("pages_to_scan", "10000")
	set("sleep_millisecs", "1")
	set("run", "1")
	merged := func() uint64 {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/ksm_merging_pages", b.Machine.PID))
		if err != nil {
			t.Fatal(err)
		}
		var n uint64
		if _, err := fmt.Sscan(string(text), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for deadline := time.Now().Add(time.Minute); merged() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("KSM merges nothing")
		}
	}
	scans := func() (n int) {
		text, err := os.ReadFile(ksm + "full_scans")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(text), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for range 3 {
		result, img := b.Capture(ctx, b.onGuard(func() {
			for from, deadline := scans(), time.Now().Add(10*time.Second); scans() < from+3 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			}
		}))
		b.Judge(ctx, result, img)
		if result.Attempts > 2 {
			t.Errorf("it took %d attempts: %q", result.Attempts, result.Lost)
		}
	}
	for deadline := time.Now().Add(time.Minute); merged() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("after the guards KSM merges nothing any more")
		}
	}
	b.running(ctx)
}
