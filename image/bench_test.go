package image

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// benchBytes is how much memory one round writes or loads.
const benchBytes = 512 << 20

// programCode is what guest memory is mostly like: the running test's own binary, whole pages of it.
func programCode(b *testing.B) []byte {
	path, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	code, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	return code[:len(code)/BatchBytes*BatchBytes]
}

// writeBench writes an image of benchBytes, all of content over and over. Copying it into the batches is part of what is
// measured, since whoever captures a guest does that as well.
func writeBench(b *testing.B, r *Repository, name string, parent *Image, how Compression, content []byte) *Image {
	b.Helper()
	ctx := context.Background()
	w, err := r.Create(ctx, Spec{
		Name: name, Parent: parent, Compression: how,
		Blocks: []BlockInfo{{"ram", benchBytes}},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Abort()
	for at := 0; at < benchBytes; at += BatchBytes {
		batch, err := w.Batch(ctx)
		if err != nil {
			b.Fatal(err)
		}
		for i := range uint64(BatchPages) {
			batch.Pages = append(batch.Pages, uint64(at)/pageset.PageBytes+i)
		}
		from := at % len(content)
		batch.Data = append(batch.Data, content[from:from+BatchBytes]...)
		w.Submit(batch)
	}
	if err := w.Flush(ctx); err != nil {
		b.Fatal(err)
	}
	i, err := w.Seal(ctx, Contents{})
	if err != nil {
		b.Fatal(err)
	}
	return i
}

func BenchmarkWriter(b *testing.B) {
	code := programCode(b)
	for _, c := range []struct {
		name      string
		how       Compression
		content   []byte
		encrypted bool
		increment bool // on an image of the same content
	}{
		{"uniform", Zstd, make([]byte, 16*BatchBytes), false, false},
		{"none", None, code, false, false},
		{"s2", S2, code, false, false},
		{"s2-encrypted", S2, code, true, false},
		{"zstd", Zstd, code, false, false},
		{"unchanged", Zstd, code, false, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			ctx := context.Background()
			r := newBenchRepository(b, testKeys(c.encrypted))
			var parent *Image
			if c.increment {
				parent = writeBench(b, r, "parent", nil, c.how, c.content)
				defer parent.Close()
			}
			b.SetBytes(benchBytes)
			start := cpuTime(b)
			var stored int64
			for n := 0; b.Loop(); n++ {
				i := writeBench(b, r, fmt.Sprintf("image-%d", n), parent, c.how, c.content)
				stored = i.manifest.Pages.WrittenBytes
				b.StopTimer()
				i.Close()
				if err := r.Delete(ctx, i.Name()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			reportCPU(b, start)
			b.ReportMetric(float64(stored)/benchBytes, "stored/raw")
			reportMemory(b)
		})
	}
}

func BenchmarkLoad(b *testing.B) {
	code := programCode(b)
	for _, c := range []struct {
		name      string
		how       Compression
		encrypted bool
	}{
		{"none", None, false},
		{"s2", S2, false},
		{"s2-encrypted", S2, true},
		{"zstd", Zstd, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := newBenchRepository(b, testKeys(c.encrypted))
			i := writeBench(b, r, "image", nil, c.how, code)
			defer i.Close()
			b.SetBytes(benchBytes)
			start := cpuTime(b)
			for b.Loop() {
				var bytes atomic.Int64
				if err := i.Load(context.Background(), LoadOptions{}, func(s Span) error {
					bytes.Add(int64(len(s.Data)))
					return nil
				}); err != nil {
					b.Fatal(err)
				}
			}
			reportCPU(b, start)
			reportMemory(b)
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	r := newBenchRepository(b, testKeys(false))
	i := writeBench(b, r, "image", nil, Zstd, programCode(b))
	defer i.Close()
	b.SetBytes(benchBytes)
	for b.Loop() {
		if err := i.Verify(context.Background(), nil); err != nil {
			b.Fatal(err)
		}
	}
}

// newBenchRepository lies where the variable VMCKPT_BENCH_DIR says, so that a file system can be chosen to measure on.
func newBenchRepository(b *testing.B, keys Keys) *Repository {
	base := os.Getenv("VMCKPT_BENCH_DIR")
	if base == "" {
		return newRepository(b, keys)
	}
	dir, err := os.MkdirTemp(base, "bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	if err := InitRepository(dir); err != nil {
		b.Fatal(err)
	}
	r, err := OpenRepository(dir, keys)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	return r
}

// cpuTime is what the process has used of all processors. On a machine with other work to do it says more than the clock.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportCPU reports the processor time since start for each GB of memory.
func reportCPU(b *testing.B, start time.Duration) {
	b.ReportMetric((cpuTime(b)-start).Seconds()/(float64(b.N)*benchBytes/1e9), "cpu-s/GB")
}

// reportMemory reports what the runtime has taken from the system, the input of the benchmark left out of account.
func reportMemory(b *testing.B) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.Sys-m.HeapReleased)/(1<<20), "MiB-memory")
}
