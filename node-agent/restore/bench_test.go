package restore

import (
	"testing"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// BenchmarkRestore restores 1 GiB, nearly all of it ordinary pages, into a standing machine that has it populated already.
func BenchmarkRestore(b *testing.B) {
	for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
		for _, compression := range []image.Compression{image.S2, image.Zstd, image.None} {
			b.Run(string(memory)+"-"+compression.String(), func(b *testing.B) {
				r := newRig(b)
				source := r.start(machine.Options{QEMU: machine.V10, Accel: machine.KVM, Memory: memory, MemoryBytes: machine.GiB,
					Guest: machine.Writer{Parameters: writer.Parameters{Whole: true, PagesPerPass: 4096}}})
				if _, err := source.WaitWriter(b.Context(), func(s writer.Status) bool { return s.Pages > machine.GiB/4096 }); err != nil {
					b.Fatal(err)
				}
				if err := source.Stop(b.Context()); err != nil {
					b.Fatal(err)
				}
				_, err := capture.Run(b.Context(), capture.Target{Process: source.process, Monitor: source.monitor}, r.repo, capture.Options{
					Name: "base", RecordDir: r.records, Compression: compression,
				})
				if err != nil {
					b.Fatal(err)
				}
				img := r.open("base")
				phases := map[string]float64{}
				b.SetBytes(int64(machine.GiB))
				for b.Loop() {
					result, err := Run(b.Context(), source.target(), img, Options{RecordDir: r.records})
					if err != nil {
						b.Fatal(err)
					}
					for _, p := range result.Phases {
						phases[p.Name] += p.Duration.Seconds() * 1000
					}
				}
				for name, ms := range phases {
					b.ReportMetric(ms/float64(b.N), name+"-ms")
				}
			})
		}
	}
}
