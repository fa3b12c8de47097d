package truth

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

var (
	instants = flag.Int("instants", 0, "random instants for each machine; 0: as many as it takes for enough of them on all machines together")
	seed     = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of what is random in the tests")
)

// enough is how many random instants are judged at the least, however many machines can be started here.
const enough = 200

// What the result of a capture says of how its pages were chosen.
const (
	byPageTables  = "page tables"
	byContentHash = "content hash"
	asBase        = ""
)

// bench is a machine to which random things are done.
type bench struct {
	*Bench
	t        *testing.T
	rng      *rand.Rand
	tracked  bool   // the page tables tell of all its memory what is written to it
	balloon  uint64 // bytes that the balloon leaves the guest
	judged   int    // random instants
	chance   bool   // KVM's dirty log is kept or not by chance
	compared int    // of those, where KVM's log saw the whole time
	guarded  int    // of those, with memory on a guard
	caught   uint64 // pages that the guest was about to write then
}

// newBench starts a machine. Everything that is random comes from the flag's seed and the test's name.
func newBench(t *testing.T, o machine.Options) *bench {
	name := uint64(0)
	for _, c := range t.Name() {
		name = name*31 + uint64(c)
	}
	t.Logf("seed %d", *seed)
	b := &bench{Bench: NewBench(t, o), t: t, rng: rand.New(rand.NewPCG(*seed, name)), balloon: o.MemoryBytes, chance: true}
	// A balloon punches holes into shared memory, which its page tables do not tell of.
	b.tracked = kernelTracks(t) && (o.Memory != machine.Memfd || !b.Machine.Options().Balloon)
	return b
}

// kernelTracks says whether the kernel has asynchronous write protection and PAGEMAP_SCAN, which came with Linux 6.7. It does not ask
// what the product asks.
func kernelTracks(t *testing.T) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	release := unix.ByteSliceToString(name.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatalf("kernel release %q: %v", release, err)
	}
	return major > 6 || major == 6 && minor >= 7
}

// bare says whether the guest is the bare-metal one.
func (b *bench) bare() bool {
	_, bare := b.Machine.Options().Guest.(machine.Writer)
	return bare
}

// wait lets the guest work for a random time, mostly short: the moments that are dangerous are those right after a capture.
func (b *bench) wait(ctx context.Context) {
	d := time.Duration(b.rng.ExpFloat64() * float64(30*time.Millisecond))
	select {
	case <-time.After(min(d, 500*time.Millisecond)):
	case <-ctx.Done():
	}
}

// vary changes what the bare-metal guest does.
func (b *bench) vary(ctx context.Context) {
	if !b.bare() {
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

// kind is what is special about a checkpoint of the random plan.
type kind int

const (
	ordinary      kind = iota
	full               // a base
	anotherRecord      // another place for session records: nothing is known of what was written
	anotherParent      // a parent at random, mostly not the last image

	kinds          // how many there are
	kindEvery = 15 // one of each kind comes in so many checkpoints
)

// plan puts the kinds in random order. All of them come where there is room.
func (b *bench) plan(n int) []kind {
	plan := make([]kind, n)
	for i := range plan {
		if k := kind(i % kindEvery); k < kinds {
			plan[i] = k
		}
	}
	b.rng.Shuffle(n, func(i, j int) { plan[i], plan[j] = plan[j], plan[i] })
	return plan
}

// run takes n checkpoints at random moments, and judges each. before, if there, is called for each.
func (b *bench) run(ctx context.Context, n int, before func(i int)) {
	b.t.Helper()
	sources := map[string]int{}
	for i, k := range b.plan(n) {
		if before != nil {
			before(i)
		}
		result := b.instant(ctx, k)
		sources[fmt.Sprintf("%q", result.Source)]++
		b.judged++
	}
	b.t.Logf("%d instants by source: %v; so far %d with a guard, which caught %d pages, and %d with a witness", n, sources, b.guarded, b.caught, b.compared)
}

// instant takes a checkpoint at a random moment and judges it.
func (b *bench) instant(ctx context.Context, k kind) *capture.Result {
	b.t.Helper()
	last := b.Names[len(b.Names)-1]
	var wrote writer.Status
	b.vary(ctx)
	b.wait(ctx)
	if b.bare() {
		wrote = b.untilWritten(ctx)
	}
	o := b.Options()
	o.Witness = o.Witness || b.chance && b.rng.IntN(3) != 0
	switch b.rng.IntN(4) {
	case 0:
		o.Instant = capture.Early
	case 1: // all that can be is guarded
		o.Instant, o.ResidueBudget = capture.Early, time.Microsecond
	case 2:
		o.ResidueBudget = time.Microsecond
	}
	source, parent := byPageTables, last
	switch k {
	case full:
		o.Mode = capture.Full
		source, parent = asBase, ""
	case anotherRecord:
		b.RecordDir = b.t.TempDir()
		o.RecordDir = b.RecordDir
		source = byContentHash
	case anotherParent:
		parent = b.Names[b.rng.IntN(len(b.Names))]
		o.Parent = parent
		if parent != last {
			source = byContentHash
		}
	}
	if source == byPageTables && !b.tracked {
		source = byContentHash
	}
	result, img := b.Capture(ctx, o)
	b.Judge(ctx, result, img)
	if result.Witness.Alarm() {
		b.t.Errorf("image %s: the page tables missed writes: %s", o.Name, show(result))
	}
	if result.Witness != nil && result.Witness.Compared {
		b.compared++
	}
	if result.Guard != nil {
		b.guarded++
		b.caught += result.Guard.Caught
	}
	if result.Source != source || result.Parent != parent {
		b.t.Errorf("image %s was made on %q by %q (%s); want on %q by %q", o.Name, result.Parent, result.Source, result.Why, parent, source)
	}
	if k == anotherRecord && b.tracked && !strings.Contains(result.Why, "no record of tracking") {
		b.t.Errorf("image %s was made without a session record, and says why it compared: %q", o.Name, result.Why)
	}
	if b.bare() {
		// What the guest says of itself in the very memory that the image was judged by.
		if now := b.status(); now.Passes < wrote.Passes || now.DMAPages < wrote.DMAPages || now.Errors > 0 {
			b.t.Errorf("image %s: the guest's account is %+v, and was %+v before", o.Name, now, wrote)
		}
	}
	return result
}

// status is the bare-metal guest's account of its work at the last instant.
func (b *bench) status() writer.Status {
	b.t.Helper()
	memory := b.Oracle.Memory("pc.ram")
	if memory == nil {
		b.t.Fatal("the machine has no block pc.ram")
	}
	s, begun := writer.ParseStatus(memory[writer.StatusGPA:][:writer.StatusBytes])
	if !begun {
		b.t.Fatal("the guest had not begun")
	}
	return s
}

// untilWritten waits until the bare-metal guest has written by vCPU and by DMA since the last instant, and returns its account. It
// nearly always has.
func (b *bench) untilWritten(ctx context.Context) writer.Status {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	last := b.status()
	now, err := b.Machine.WaitWriter(ctx, func(s writer.Status) bool {
		return s.Passes > last.Passes && s.Pages > last.Pages && s.DMAPages > last.DMAPages
	})
	if err != nil {
		b.t.Fatalf("the guest does not write: %v", err)
	}
	return now
}

// running makes sure that the machine runs.
func (b *bench) running(ctx context.Context) {
	b.t.Helper()
	if state, err := qemu.Status(ctx, b.Machine.Monitor); err != nil || state != qemu.StateRunning {
		b.t.Errorf("afterwards the machine is %q, %v", state, err)
	}
}

// configuration is a machine to be judged.
type configuration struct {
	name    string
	options machine.Options
	judge   func(t *testing.T, o machine.Options, n int) (judged int)
}

// TestInstants judges random instants of all kinds of machines.
func TestInstants(t *testing.T) {
	machines := append(bareMetal(), linux()...)
	n, missing := instantsEach(t, machines)
	started, judged := 0, 0
	for _, m := range machines {
		t.Run(m.name, func(t *testing.T) {
			started++
			judged += m.judge(t, m.options, n)
			if !kernelTracks(t) {
				t.Run("tracking", func(t *testing.T) { t.Skip("Linux 6.7 is missing, for tracking by the page tables: all was compared") })
			}
		})
	}
	t.Logf("%d random instants judged", judged)
	switch {
	case *instants > 0 || started < len(machines): // as many as were asked for, or of the machines that were asked for
	case len(missing) == len(machines):
		t.Skipf("no machine can be started here: %s", strings.Join(missing, "; "))
	case judged < enough:
		t.Errorf("%d random instants are not enough, %d are wanted; missing: %s", judged, enough, strings.Join(missing, "; "))
	}
}

// instantsEach returns how many random instants each machine gets, and which machines cannot be had here and why. The others get
// more in their place.
func instantsEach(t *testing.T, machines []configuration) (n int, missing []string) {
	t.Helper()
	for _, m := range machines {
		if err := machine.Available(t.Context(), m.options); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", m.name, err))
		}
	}
	there := len(machines) - len(missing)
	if *instants > 0 || there == 0 {
		return max(*instants, 1), missing
	}
	return (enough + there - 1) / there, missing
}

// bareMetal are machines with the bare-metal guest, which writes by vCPU and by DMA as fast as it can.
func bareMetal() []configuration {
	var all []configuration
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, accel := range []machine.Accel{machine.KVM, machine.TCG} {
			for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
				o := machine.Options{QEMU: version, Accel: accel, Memory: memory, MemoryBytes: 96 * machine.MiB}
				o.Guest = machine.Writer{Percent: 60, Parameters: writer.Parameters{Random: true, DMAPagesPerPass: 2}}
				all = append(all, configuration{"bare-" + o.String(), o, judgeBareMetal})
			}
		}
	}
	return all
}

func judgeBareMetal(t *testing.T, o machine.Options, n int) int {
	b := newBench(t, o)
	result, img := b.Capture(t.Context(), b.Options())
	b.Judge(t.Context(), result, img)
	if s := b.status(); !s.DMAReady {
		t.Fatalf("the guest does not write by DMA: %+v", s)
	}
	b.run(t.Context(), n, nil)
	// It goes on after the last one.
	b.untilWritten(t.Context())
	b.running(t.Context())
	if s, _, err := b.Machine.WriterStatus(t.Context()); err != nil || s.Errors > 0 {
		t.Errorf("the guest itself found: %+v, %v", s, err)
	}
	return b.judged
}
