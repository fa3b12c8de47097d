package main

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
)

// steps measures where the time of an increment goes in which next to nothing changed: what every checkpoint costs at the least.
func steps(ctx context.Context, b *bench) ([]table, error) {
	t := table{
		Title: "What an increment costs at the least",
		Text: "Increments of idle guests with 10 MB changed, taken in the program's own process, by the steps of a checkpoint: the time from the step before to this one. " +
			"All memory of the guests holds something.",
		Columns: []string{"until"},
	}
	cells := map[capture.Step][]*cell{}
	sizes := []uint64{machine.GiB, 4 * machine.GiB}
	for range sizes {
		t.Columns = append(t.Columns, "")
	}
	order := append(append([]capture.Step{}, capture.Steps...), "end", "in all")
	for i, bytes := range sizes {
		t.Columns[1+i] = fmt.Sprintf("%d GiB", bytes>>30)
		err := b.with(ctx, machine.Options{Guest: machine.Idle{}, MemoryBytes: bytes}, "", func(r *rig) error {
			code := uniform()
			if err := r.fill(code); err != nil {
				return err
			}
			code = randomBytes()
			if _, err := r.capture(ctx, capture.Full, image.S2); err != nil {
				return err
			}
			for range 3 * b.runs {
				if err := r.poke(code); err != nil {
					return err
				}
				debug.FreeOSMemory()
				took, err := r.step(ctx)
				if err != nil {
					return err
				}
				for step, d := range took {
					if cells[step] == nil {
						for range sizes {
							cells[step] = append(cells[step], &cell{Unit: milliseconds})
						}
					}
					cells[step][i].add(inMilliseconds(d))
				}
			}
			return nil
		})
		if err != nil {
			return []table{t}, err
		}
	}
	for _, step := range order {
		if c := cells[step]; c != nil {
			t.Lines = append(t.Lines, line{string(step), c})
		}
	}
	return []table{t}, nil
}

// step takes an increment here, and returns how long each step took.
func (r *rig) step(ctx context.Context) (map[capture.Step]time.Duration, error) {
	took := map[capture.Step]time.Duration{}
	monitor, err := qemu.DialUnix(ctx, r.Socket)
	if err != nil {
		return nil, err
	}
	defer monitor.Close()
	err = r.withRepository(func(repository *image.Repository) error {
		r.images++
		begin := time.Now()
		last := begin
		stamp := func(s capture.Step) {
			now := time.Now()
			took[s], last = now.Sub(last), now
		}
		_, err := capture.Run(ctx, capture.Target{Process: r.process, Monitor: monitor}, repository, capture.Options{
			Name: r.newest(), Mode: capture.Incremental, Compression: image.Zstd, RecordDir: r.records, Hooks: capture.Hooks{Step: stamp},
		})
		stamp("end")
		took["in all"] = time.Since(begin)
		return err
	})
	return took, err
}
