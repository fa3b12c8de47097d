package main

import (
	"context"
	"fmt"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/test/machine"
)

// restores measures how fast an image is put into a fresh machine.
func restores(ctx context.Context, b *bench) ([]table, error) {
	code, err := programCode(ctx)
	if err != nil {
		return nil, err
	}
	t := table{
		Title: "Restores",
		Text: "Of an image of 1 GiB of program code into a fresh machine that stands still, the image in the page cache: bytes of guest memory by the time. " +
			"The whole restore first reads and verifies all of the image, and compares in the end.",
	}
	whole := map[image.Compression]*cell{}
	put := map[image.Compression]*cell{}
	for _, how := range []image.Compression{image.Zstd, image.S2} {
		put[how] = t.figure(fmt.Sprintf("memory put in, %v", how), gigaRate, nil)
		whole[how] = t.figure(fmt.Sprintf("the whole restore, %v", how), gigaRate, atLeast(1))
	}
	parts := table{Title: "The parts of a restore", Columns: []string{"", "zstd", "S2"}}
	cells := map[string][]*cell{}
	err = b.with(ctx, machine.Options{Guest: machine.Idle{}, MemoryBytes: machine.GiB}, "", func(r *rig) error {
		if err := r.fill(code); err != nil {
			return err
		}
		for i, how := range []image.Compression{image.Zstd, image.S2} {
			if _, err := r.capture(ctx, capture.Full, how); err != nil {
				return err
			}
			for range b.runs {
				result, err := r.restoreTwin(ctx)
				if err != nil {
					return err
				}
				bytes := float64(result.Memory.Bytes)
				whole[how].add(bytes / 1e9 / result.Duration.Seconds())
				for _, p := range result.Phases {
					if p.Name == "memory" {
						put[how].add(bytes / 1e9 / p.Duration.Seconds())
					}
					if cells[p.Name] == nil {
						cells[p.Name] = parts.row(p.Name, milliseconds, milliseconds)
					}
					cells[p.Name][i].add(inMilliseconds(p.Duration))
				}
			}
		}
		return nil
	})
	return []table{t, parts}, err
}

// restoreTwin restores the newest image into a machine like this one.
func (r *rig) restoreTwin(ctx context.Context) (*restore.Result, error) {
	twin, err := machine.Launch(ctx, r.Twin())
	if err != nil {
		return nil, err
	}
	defer twin.Close()
	return jobs.Restore(ctx, jobs.RestoreRequest{
		VM: jobs.VM{PID: twin.PID, QMPSocket: twin.Socket}, Repository: r.repository, Image: r.newest(), RecordDir: r.records,
	}, jobs.Handlers[restore.Progress]{})
}
