package truth

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// omit takes a checkpoint that leaves pages of the main memory out on purpose, which have changed since the last instant. All of them have
// to be found, and no other.
func (b *bench) omit(when capture.When, victims ...uint64) {
	b.t.Helper()
	ctx := b.t.Context()
	page := func(number uint64) []byte {
		return b.Oracle.Memory("pc.ram")[number*pageset.PageBytes:][:pageset.PageBytes]
	}
	before := make(map[uint64][]byte)
	for _, number := range victims {
		before[number] = slices.Clone(page(number))
	}
	// A page may hold by chance what it held then, as when the disk reads the same place again: one in a thousand.
	for range 3 {
		o := b.Options()
		if o.Instant = when; when == capture.Early {
			o.ResidueBudget = time.Microsecond // all of it on a guard
		}
		o.Hooks.Omit = func(block int, page uint64) bool { return block == 0 && slices.Contains(victims, page) }
		result, img := b.Capture(ctx, o)
		if b.tracked && result.Source != byPageTables {
			b.t.Errorf("taken by %q: %s", result.Source, result.Why)
		}
		if slices.ContainsFunc(victims, func(number uint64) bool { return bytes.Equal(page(number), before[number]) }) {
			continue
		}
		wrong, err := b.Oracle.Compare(ctx, img)
		if err != nil {
			b.t.Fatal(err)
		}
		var found []uint64
		for _, w := range wrong {
			if w.Block != "pc.ram" {
				b.t.Errorf("found wrong as well: %v", w)
				continue
			}
			found = append(found, w.Page)
		}
		slices.Sort(victims)
		slices.Sort(found)
		if diff := cmp.Diff(victims, found); diff != "" {
			b.t.Errorf("pages left out and pages found wrong (-left out +found):\n%s", diff)
		}
		return
	}
	b.t.Fatalf("of the pages %#x not all have changed", victims)
}

// TestOmittedPageIsFound judges the judge: a page that is written, and left out of the image on purpose, has to be found.
func TestOmittedPageIsFound(t *testing.T) {
	for _, accel := range []machine.Accel{machine.TCG, machine.KVM} {
		for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
			o := machine.Options{Accel: accel, Memory: memory, MemoryBytes: 64 * machine.MiB}
			when := capture.Late
			bare := func(t *testing.T) {
				o.Guest = machine.Writer{Percent: 50, Parameters: writer.Parameters{Whole: true}}
				b := newBench(t, o)
				b.Capture(t.Context(), b.Options())
				before := b.status()
				p := b.Machine.WriterParameters()
				if _, err := b.Machine.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > before.Pages+2*p.Low.Pages }); err != nil {
					t.Fatal(err)
				}
				b.omit(when, p.Low.GPA/pageset.PageBytes+b.rng.Uint64N(p.Low.Pages))
			}
			t.Run("bare-"+o.String(), bare)
			when = capture.Early
			t.Run("guarded-"+o.String(), bare)
		}
	}
	for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
		o := machine.Options{QEMU: machine.V10, Memory: memory}
		t.Run("linux-"+o.String(), func(t *testing.T) { omitOfLinux(t, o) })
	}
}

// omitOfLinux leaves out one page that a process of the guest wrote, and one that its disk did.
func omitOfLinux(t *testing.T, o machine.Options) {
	guest := machine.Linux{Loads: []machine.Load{machine.Counter, machine.DMA}, BufferMiB: 8, Step: 20 * time.Millisecond, WorkMiB: 16}
	o.Guest, o.MemoryBytes, o.Disk = guest, 128*machine.MiB, &machine.Disk{Direct: true, AIO: "native"}
	b := newBench(t, o)
	b.Capture(t.Context(), b.Options())
	count, memory := b.account()[machine.Counter], b.Oracle.Memory("pc.ram")

	// What the counter will rewrite soon, it wrote a whole turn around the buffer ago: long before the instant, though at which count that
	// was is known only roughly.
	counter := guest.Counter()
	groups := counter.Pages / counter.GroupPages
	buffer := make([]byte, counter.Pages*workload.PageBytes)
	counter.Fill(buffer)
	for n := range count {
		counter.Step(buffer, n+1)
	}
	rewritten := count + groups/16
	page := rewritten % groups * counter.GroupPages
	counted := pageWith(t, memory, buffer[page*workload.PageBytes:][:workload.PageBytes])
	read := diskPage(t, memory)

	// Until the counter has come past that count, and the disk has filled each of its 64 buffers again.
	before := b.account()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		now := b.account()
		if now[machine.Counter] > rewritten+1 && now[machine.DMA] > before[machine.DMA]+200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not get on: it came from %v to %v", before, now)
		}
	}
	b.omit(capture.Late, counted, read)
}

// pageWith returns the page of a memory that has a content.
func pageWith(t *testing.T, memory, content []byte) uint64 {
	t.Helper()
	for page := range uint64(len(memory)) / pageset.PageBytes {
		if bytes.Equal(memory[page*pageset.PageBytes:][:pageset.PageBytes], content) {
			return page
		}
	}
	t.Fatal("the page is not in the guest's memory")
	return 0
}

// diskPage returns a page of memory that the disk has filled. The load that had it filled then spoils the first byte of every 256; what
// lies between tells the sectors.
func diskPage(t *testing.T, memory []byte) uint64 {
	t.Helper()
	const second = 8 // offset of a sector's second word, which is not spoiled
	numbers := map[uint64]uint64{}
	sector := make([]byte, workload.SectorBytes)
	for n := range machine.DefaultDiskBytes / workload.SectorBytes {
		workload.Sector(sector, n)
		numbers[binary.LittleEndian.Uint64(sector[second:])] = n
	}
	for page := range uint64(len(memory)) / pageset.PageBytes {
		p := memory[page*pageset.PageBytes:][:pageset.PageBytes]
		if n, known := numbers[binary.LittleEndian.Uint64(p[second:])]; known && isSectors(p, n) {
			return page
		}
	}
	t.Fatal("no page that the disk filled is in the guest's memory")
	return 0
}

// isSectors says whether a page holds sectors from number n on, but for the bytes that are spoiled.
func isSectors(page []byte, n uint64) bool {
	want := make([]byte, workload.SectorBytes)
	for off := 0; off < len(page); off += workload.SectorBytes {
		workload.Sector(want, n+uint64(off/workload.SectorBytes))
		got := slices.Clone(page[off:][:workload.SectorBytes])
		for _, spoiled := range []int{0, 256} {
			got[spoiled] = want[spoiled]
		}
		if !bytes.Equal(got, want) {
			return false
		}
	}
	return true
}
