package truth

import (
	"context"
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

var (
	instants = flag.Int("instants", 17, "random instants for each machine")
	seed     = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of what is random in the tests")
)

// bench is a machine to which random things are done.
type bench struct {
	*Bench
	t   *testing.T
	rng *rand.Rand
}

// newBench starts a machine. Everything that is random comes from the flag's seed and the test's name.
func newBench(t *testing.T, o machine.Options) *bench {
	name := uint64(0)
	for _, c := range t.Name() {
		name = name*31 + uint64(c)
	}
	t.Logf("seed %d", *seed)
	return &bench{NewBench(t, o), t, rand.New(rand.NewPCG(*seed, name))}
}

// wait lets the guest work for a random time, mostly short: the moments that are dangerous are those right after a capture.
func (b *bench) wait(ctx context.Context) {
	d := time.Duration(b.rng.ExpFloat64() * float64(30*time.Millisecond))
	select {
	case <-time.After(min(d, 500*time.Millisecond)):
	case <-ctx.Done():
	}
}

// vary changes what the guest does.
func (b *bench) vary(ctx context.Context) {
	if _, bare := b.Machine.Options().Guest.(machine.Writer); !bare {
		// The balloon takes up to a fifth of the memory, or gives it back.
		memory := b.Machine.Options().MemoryBytes
		size := map[string]any{"value": memory - b.rng.Uint64N(memory/5)}
		if err := b.Machine.Monitor.Execute(ctx, "balloon", size, nil); err != nil {
			b.t.Fatal(err)
		}
		return
	}
	p := b.Machine.WriterParameters()
	p.Random, p.Whole, p.Uniform = b.rng.IntN(2) == 0, b.rng.IntN(2) == 0, b.rng.IntN(8) == 0
	p.PagesPerPass = 1 << b.rng.IntN(12)
	if b.rng.IntN(3) == 0 {
		p.Spin = b.rng.Uint64N(1_000_000)
	}
	if p.DMA.Pages > 0 {
		p.DMAPagesPerPass = 1 + b.rng.Uint64N(8)
	}
	if err := b.Machine.SetWriterParameters(ctx, p); err != nil {
		b.t.Fatal(err)
	}
}

// run takes n checkpoints at random moments, and judges each.
func (b *bench) run(ctx context.Context, n int) {
	b.t.Helper()
	sources := map[string]int{}
	for range n {
		b.vary(ctx)
		b.wait(ctx)
		o := b.Options()
		switch b.rng.IntN(12) {
		case 0:
			o.Mode = capture.Full
		case 1: // another place for records: nothing is known
			b.RecordDir = b.t.TempDir()
			o.RecordDir = b.RecordDir
		case 2: // a parent that is not the last image
			o.Parent = b.Names[b.rng.IntN(len(b.Names))]
		}
		result, img := b.Capture(ctx, o)
		b.Judge(ctx, result, img)
		sources[result.Source]++
	}
	b.t.Logf("%d instants by source: %v", n, sources)
}

func TestBareMetal(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, accel := range []machine.Accel{machine.KVM, machine.TCG} {
			for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
				o := machine.Options{QEMU: version, Accel: accel, Memory: memory, MemoryBytes: 96 * machine.MiB}
				t.Run(o.String(), func(t *testing.T) {
					o.Guest = machine.Writer{Percent: 60, Parameters: writer.Parameters{Random: true, DMAPagesPerPass: 2}}
					b := newBench(t, o)
					first := b.Options()
					result, img := b.Capture(t.Context(), first)
					b.Judge(t.Context(), result, img)
					b.run(t.Context(), *instants)
					if s, _, err := b.Machine.WriterStatus(t.Context()); err != nil || s.Errors > 0 {
						t.Errorf("the guest itself found: %+v, %v", s, err)
					}
				})
			}
		}
	}
}

// TestLinux captures Debian's kernel while a disk and a network card write its memory by DMA, and while it gives memory back by free
// page reporting.
func TestLinux(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
			o := machine.Options{
				QEMU: version, Memory: memory, MemoryBytes: 256 * machine.MiB, FreePageReporting: true, Net: true,
				Disk:  &machine.Disk{Direct: true, AIO: "native", IOThread: version == machine.V10},
				Guest: machine.Linux{Loads: []machine.Load{machine.Counter, machine.DMA, machine.Net, machine.Alloc, machine.Stress}},
			}
			t.Run(o.String(), func(t *testing.T) {
				b := newBench(t, o)
				result, img := b.Capture(t.Context(), b.Options())
				b.Judge(t.Context(), result, img)
				b.run(t.Context(), *instants)
			})
		}
	}
}

// TestOmittedPageIsFound judges the judge: a page that is written, and left out of the image on purpose, has to be found.
func TestOmittedPageIsFound(t *testing.T) {
	b := newBench(t, machine.Options{Accel: machine.TCG, MemoryBytes: 64 * machine.MiB,
		Guest: machine.Writer{Percent: 50, Parameters: writer.Parameters{Whole: true}}})
	b.Capture(t.Context(), b.Options())
	passes, _, err := b.Machine.WriterStatus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := b.Machine.WriterParameters()
	if _, err := b.Machine.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Pages > passes.Pages+2*p.Low.Pages }); err != nil {
		t.Fatal(err)
	}
	victim := p.Low.GPA/4096 + b.rng.Uint64N(p.Low.Pages)
	o := b.Options()
	o.Hooks.Omit = func(block int, page uint64) bool { return block == 0 && page == victim }
	_, img := b.Capture(t.Context(), o)
	wrong, err := b.Oracle.Compare(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	if len(wrong) != 1 || wrong[0].Page != victim {
		t.Fatalf("page %#x was left out; found wrong: %v", victim, wrong)
	}
}
