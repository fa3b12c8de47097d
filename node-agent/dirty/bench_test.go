package dirty

import (
	"flag"
	"fmt"
	"testing"
	"time"
)

var benchmarkMiB = flag.Uint64("mib", 4096, "memory of the process in benchmarks")

// What a standstill and a live harvest cost, by how much was written since the last one. Pages are spread evenly, the
// worst case.
func BenchmarkHarvest(b *testing.B) {
	for _, kind := range []area{{Name: "private"}, {Name: "private huge", Huge: true}, {Name: "shared", Shared: true}} {
		b.Run(kind.Name, func(b *testing.B) {
			kind.Pages, kind.Touch = *benchmarkMiB*256, true
			c := startChild(b, kind)
			dir := b.TempDir()
			started := time.Now()
			s := c.open(dir)
			b.Logf("open: %v", time.Since(started))
			started = time.Now()
			if _, err := s.HarvestLive(b.Context()); err != nil {
				b.Fatal(err)
			}
			b.Logf("first live harvest: %v", time.Since(started))
			for _, every := range []uint64{0, 430, 100, 10} {
				name := "clean"
				if every > 0 {
					name = fmt.Sprintf("1 in %d written", every)
				}
				dirty := func() {
					if every > 0 {
						c.do(command{Op: "spread", Seed: every})
					}
				}
				b.Run("estimate, "+name, func(b *testing.B) {
					dirty()
					for b.Loop() {
						if _, err := s.Estimate(b.Context()); err != nil {
							b.Fatal(err)
						}
					}
				})
				b.Run("live, "+name, func(b *testing.B) {
					for b.Loop() {
						b.StopTimer()
						dirty()
						b.StartTimer()
						if _, err := s.HarvestLive(b.Context()); err != nil {
							b.Fatal(err)
						}
					}
				})
				b.Run("standing, "+name, func(b *testing.B) {
					var look, rearm time.Duration
					for b.Loop() {
						b.StopTimer()
						dirty()
						b.StartTimer()
						started := time.Now()
						in, err := s.HarvestStanding(b.Context(), &standing{})
						if err != nil {
							b.Fatal(err)
						}
						looked := time.Now()
						if _, err := in.Rearm(b.Context()); err != nil {
							b.Fatal(err)
						}
						look += looked.Sub(started)
						rearm += time.Since(looked)
					}
					b.ReportMetric(float64(look.Microseconds())/float64(b.N), "µs-look/op")
					b.ReportMetric(float64(rearm.Microseconds())/float64(b.N), "µs-rearm/op")
				})
			}
			s.Close()
			started = time.Now()
			if _, err := Release(b.Context(), c.process(), dir); err != nil {
				b.Fatal(err)
			}
			b.Logf("release: %v", time.Since(started))
		})
	}
}
