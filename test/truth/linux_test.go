package truth

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/machine"
)

// linux are machines with Debian's kernel, whose memory a disk and a network card write by DMA. Those with a balloon give memory back,
// by it and by free page reporting; shared memory is not tracked then, so that there is a machine without.
//
// QEMU 10's TCG loses a request's interrupt when the machine is stopped while an iothread serves the disk: the guest then waits for its
// disk for ever (seen within 40 times of plain stop and cont). So it is QEMU 7.2 that has the iothread.
func linux() []configuration {
	var all []configuration
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, c := range []struct {
			name    string
			memory  machine.Memory
			balloon bool
		}{{"balloon", machine.Private, true}, {"balloon", machine.Memfd, true}, {"dma", machine.Memfd, false}} {
			memory := uint64(256 * machine.MiB)
			if c.balloon { // what it takes is beyond what the loads need: one that has too little panics
				memory = 320 * machine.MiB
			}
			o := machine.Options{
				QEMU: version, Memory: c.memory, MemoryBytes: memory, FreePageReporting: c.balloon, Net: true,
				Disk:  &machine.Disk{Direct: true, AIO: "native", IOThread: version == machine.V72},
				Guest: machine.Linux{Loads: loads, WorkMiB: 16},
			}
			all = append(all, configuration{fmt.Sprintf("linux-%v-%s", o, c.name), o, judgeLinux})
		}
	}
	return all
}

var loads = []machine.Load{machine.Counter, machine.DMA, machine.Net, machine.Alloc, machine.Stress}

// reportPages is the least that Linux reports as free at once: a block of pageblock_order, 9 on x86-64 (mm/page_reporting.c).
const reportPages = 512

func judgeLinux(t *testing.T, o machine.Options, n int) int {
	ctx := t.Context()
	b := newBench(t, o)
	began := b.account()
	result, img := b.Capture(ctx, b.Options())
	b.Judge(ctx, result, img)
	if !o.FreePageReporting {
		b.run(ctx, n, nil)
		b.goesOn(ctx, began)
		return b.judged
	}

	// As long as the balloon takes nothing, what the guest gives back is by free page reporting.
	var reported uint64
	b.run(ctx, n-n/2, func(int) { reported += b.Oracle.GivenBack() })
	for deadline := time.Now().Add(time.Minute); reported < reportPages; reported += b.Oracle.GivenBack() {
		if time.Now().After(deadline) {
			t.Fatalf("free page reporting gave back no more than %d pages", reported)
		}
		time.Sleep(200 * time.Millisecond)
		b.instant(ctx, ordinary)
	}
	t.Logf("%d pages given back by free page reporting", reported)

	// The balloon takes up to a fifth of the memory, or gives it back.
	b.run(ctx, n/2, func(int) { b.setBalloon(ctx, o.MemoryBytes-b.rng.Uint64N(o.MemoryBytes/5)) })
	taken := o.MemoryBytes / 8
	b.setBalloon(ctx, o.MemoryBytes-taken)
	b.balloonIs(ctx, o.MemoryBytes-taken)
	b.instant(ctx, ordinary)
	// The kernel may fill up huge pages from which the balloon took a part, so not all of it need be missing.
	if absent, want := b.absent(ctx), taken/pageset.PageBytes/2; absent < want {
		t.Errorf("the balloon took %d pages, and the image has content for all but %d", taken/pageset.PageBytes, absent)
	}
	b.setBalloon(ctx, o.MemoryBytes)
	b.balloonIs(ctx, o.MemoryBytes)
	b.instant(ctx, ordinary)
	b.goesOn(ctx, began)
	return b.judged
}

// setBalloon asks the guest to make do with so much memory. It takes its time.
func (b *bench) setBalloon(ctx context.Context, bytes uint64) {
	b.t.Helper()
	if err := b.Machine.Monitor.Execute(ctx, "balloon", map[string]any{"value": bytes}, nil); err != nil {
		b.t.Fatal(err)
	}
}

// balloonIs waits until the guest makes do with so much memory.
func (b *bench) balloonIs(ctx context.Context, bytes uint64) {
	b.t.Helper()
	var now struct{ Actual uint64 }
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if err := b.Machine.Monitor.Execute(ctx, "query-balloon", nil, &now); err != nil {
			b.t.Fatal(err)
		}
		if now.Actual == bytes {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("the balloon was told to leave %d bytes, and leaves %d", bytes, now.Actual)
		}
	}
}

// absent is how many pages of the main memory the last image says to be unpopulated.
func (b *bench) absent(ctx context.Context) uint64 {
	b.t.Helper()
	img, err := b.Repository.Open(ctx, b.Names[len(b.Names)-1])
	if err != nil {
		b.t.Fatal(err)
	}
	defer img.Close()
	var pages uint64
	for e, err := range img.Extents(0) {
		if err != nil {
			b.t.Fatal(err)
		}
		if e.Kind == image.Unpopulated {
			pages += e.Run.Count
		}
	}
	return pages
}

// account is how far each load of a Linux guest has come, by what it says on the serial console.
type account map[machine.Load]uint64

// progress reads a line of the serial console: a load's account of itself, or false.
func progress(line string) (machine.Load, uint64, bool) {
	if state, ok := workload.ParseState(line); ok {
		return machine.Counter, state.Count, true
	}
	for load, format := range map[machine.Load]string{
		machine.DMA: "dma: %d reads ok", machine.Net: "net: %d echoes ok", machine.Alloc: "alloc: %d allocations ok", machine.Stress: "stress: %d writes ok",
	} {
		var n uint64
		if _, err := fmt.Sscanf(line, format, &n); err == nil {
			return load, n, true
		}
	}
	return "", 0, false
}

func (b *bench) serial() []string {
	b.t.Helper()
	lines, err := b.Machine.Serial.Lines()
	if err != nil {
		b.t.Fatal(err)
	}
	return lines
}

func (b *bench) account() account {
	b.t.Helper()
	a := account{}
	for _, line := range b.serial() {
		if load, n, ok := progress(line); ok {
			a[load] = n
		}
	}
	return a
}

// goesOn makes sure that the guest runs, that every load gets on from now and has got on since it was looked at before, and that none of
// them ever found memory or disk to hold what it must not.
func (b *bench) goesOn(ctx context.Context, before account) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	b.running(ctx)
	from, now := len(b.serial()), account{}
	for _, load := range loads {
		line, _, err := b.Machine.Serial.WaitLine(ctx, from, func(line string) bool {
			l, _, ok := progress(line)
			return ok && l == load
		})
		if err != nil {
			b.t.Fatalf("%s does not go on: %v", load, err)
		}
		_, now[load], _ = progress(line)
		if now[load] <= before[load] {
			b.t.Errorf("%s came to %d, and had come to %d before the first checkpoint", load, now[load], before[load])
		}
	}
	b.t.Logf("the loads came from %v to %v", before, now)
	counter := b.Machine.Options().Guest.(machine.Linux).Counter()
	var last workload.State
	for _, line := range b.serial() {
		if state, ok := workload.ParseState(line); ok {
			last = state
		}
		switch {
		case strings.Contains(line, "CORRUPT"), strings.Contains(line, "BUG:"), strings.Contains(line, "Oops"),
			strings.HasPrefix(line, "init:") && line != "init: ready":
			b.t.Errorf("the guest says: %s", line)
		}
	}
	if hash := counter.Hash(last.Count); last.Hash != hash {
		b.t.Errorf("at count %d the guest's buffer has the hash %016x, and it must be %016x", last.Count, last.Hash, hash)
	}
}
