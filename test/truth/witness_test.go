package truth

import (
	"fmt"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// onKVM runs f on a machine of each QEMU with the bare-metal guest, writing by vCPU and by DMA, under KVM.
func onKVM(t *testing.T, f func(t *testing.T, b *bench)) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
			o := machine.Options{QEMU: version, Accel: machine.KVM, Memory: memory, MemoryBytes: 64 * machine.MiB}
			t.Run(o.String(), func(t *testing.T) {
				o.Guest = machine.Writer{Percent: 50, Parameters: writer.Parameters{Random: true, DMAPagesPerPass: 2}}
				b := newBench(t, o)
				b.witness = true
				f(t, b)
			})
		}
	}
}

// TestWitness takes random instants with KVM's dirty log as a second witness: it finds nothing that the page tables missed, and the devices'
// writes are not in it.
func TestWitness(t *testing.T) {
	onKVM(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		o := b.Options()
		o.Witness = true
		first, img := b.Capture(ctx, o)
		b.Judge(ctx, first, img)
		var compared int
		var unseen uint64
		for range 12 {
			before := b.status()
			result := b.instant(ctx, ordinary)
			w := result.Witness
			if w == nil || w.Alarm() || w.Why != "" {
				t.Fatalf("witness of image %s: %+v", result.Image, w)
			}
			if w.Compared {
				compared++
			}
			unseen += w.Unseen
			if b.status().DMAPages > before.DMAPages && w.Unseen == 0 {
				t.Errorf("image %s: DMA wrote %d pages, and all that was written is in KVM's log", result.Image, b.status().DMAPages-before.DMAPages)
			}
		}
		if compared < 12 {
			t.Errorf("compared at %d instants of 12", compared)
		}
		t.Logf("%d pages by devices alone", unseen)
	})
}

var _ = fmt.Sprint
var _ = time.Now
var _ = capture.Run
