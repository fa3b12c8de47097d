package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/machine"
)

// memoryVolume is a file system in memory, where the volume is no bound.
const memoryVolume = "/dev/shm"

// bases measures how fast bases are taken of an idle guest, by what its memory holds.
func bases(ctx context.Context, b *bench) ([]table, error) {
	code, err := programCode(ctx)
	if err != nil {
		return nil, err
	}
	t := table{
		Title: "Bases",
		Text: "Bytes of guest memory by the whole time of the checkpoint, everything synced. The guest is idle: its processor halts. " +
			"Ordinary pages are program code (the Go toolchain's own binaries, without their uniform pages), 2 GiB of it; of unpopulated and uniform memory there are 4 GiB. " +
			"How fast a compressor is alone says the same library on all processors, with the same content in frames of the same size, and nothing else to do: that bounds a base. " +
			"How fast the volume itself is says `dd` of 1 GiB to the same directory, `conv=fsync`, before, between and after the runs.",
	}
	volume := t.figure("the volume, dd", megaRate, nil)
	measure := func(r *rig, how image.Compression, rate, stored *cell) error {
		for range b.runs {
			if err := r.clear(ctx); err != nil {
				return err
			}
			taken, err := r.capture(ctx, capture.Full, how)
			if err != nil {
				return err
			}
			bytes := float64(taken.Pages.Total * 4096)
			perSecond := bytes / taken.Duration.Seconds()
			if rate.Unit == gigaRate {
				rate.add(perSecond / 1e9)
			} else {
				rate.add(perSecond / 1e6)
			}
			if stored != nil {
				stored.add(100 * float64(taken.Pages.WrittenBytes) / bytes)
			}
		}
		return nil
	}
	idle := func(bytes uint64) machine.Options { return machine.Options{Guest: machine.Idle{}, MemoryBytes: bytes} }
	for _, c := range []struct {
		name string
		how  image.Compression
		dir  string
		goal *goal
	}{
		{"ordinary pages, zstd", image.Zstd, "", atLeast(400)},
		{"ordinary pages, S2", image.S2, "", atLeast(1000)},
		{"ordinary pages, S2, to a file system in memory", image.S2, memoryVolume, nil},
		{"ordinary pages, not compressed, to a file system in memory", image.None, memoryVolume, nil},
	} {
		if err := b.dd(ctx, volume); err != nil {
			return []table{t}, err
		}
		err := b.with(ctx, idle(2*machine.GiB), c.dir, func(r *rig) error {
			if err := r.fill(code); err != nil {
				return err
			}
			rate := t.figure(c.name, megaRate, c.goal)
			if c.dir == "" {
				compressor := t.figure(c.how.String()+" alone", megaRate, nil)
				for range b.runs {
					if err := alone(c.how, code, compressor); err != nil {
						return err
					}
				}
			}
			if c.dir != "" || c.how == image.None {
				return measure(r, c.how, rate, nil)
			}
			return measure(r, c.how, rate, t.figure(c.name+": stored bytes", percent, nil))
		})
		if err != nil {
			return []table{t}, fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for _, c := range []struct {
		name string
		fill content
		goal *goal
	}{
		{"unpopulated pages", nil, atLeast(5)},
		{"uniform pages", uniform(), atLeast(3)},
	} {
		err := b.with(ctx, idle(4*machine.GiB), "", func(r *rig) error {
			if c.fill != nil {
				if err := r.fill(c.fill); err != nil {
					return err
				}
			}
			return measure(r, image.Zstd, t.figure(c.name, gigaRate, c.goal), nil)
		})
		if err != nil {
			return []table{t}, fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return []table{t}, b.dd(ctx, volume)
}

// dd measures how fast the volume takes 1 GiB.
func (b *bench) dd(ctx context.Context, rate *cell) error {
	path := filepath.Join(b.dir, "dd")
	defer os.Remove(path)
	begin := time.Now()
	out, err := exec.CommandContext(ctx, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=1024", "conv=fsync").CombinedOutput()
	if err != nil {
		return fmt.Errorf("dd: %w: %s", err, out)
	}
	rate.add(float64(machine.GiB) / 1e6 / time.Since(begin).Seconds())
	return nil
}

// memory measures how much memory a checkpoint needs itself, at its worst: of a guest with more of it than any buffer, and nothing
// that compresses.
func memory(ctx context.Context, b *bench) ([]table, error) {
	t := table{
		Title: "Own memory",
		Text: "Of a base of a guest with 4 GiB of random data: the most that the worker process ever had in memory, and the largest of its helpers (the leash's holder), " +
			"by the kernel's account (VmHWM), shared pages counted for both. zstd.",
	}
	sum := t.figure("worker and holder", mebibytes, atMost(256))
	worker, holder := t.figure("worker", mebibytes, nil), t.figure("holder", mebibytes, nil)
	rate := t.figure("speed of that base", megaRate, nil)
	err := b.with(ctx, machine.Options{Guest: machine.Idle{}, MemoryBytes: 4 * machine.GiB}, "", func(r *rig) error {
		if err := r.fill(randomBytes()); err != nil {
			return err
		}
		taken, err := r.capture(ctx, capture.Full, image.Zstd)
		if err != nil {
			return err
		}
		sum.add(float64(taken.workerPeak+taken.childPeak) / float64(machine.MiB))
		worker.add(float64(taken.workerPeak) / float64(machine.MiB))
		holder.add(float64(taken.childPeak) / float64(machine.MiB))
		rate.add(float64(taken.Pages.Total*4096) / 1e6 / taken.Duration.Seconds())
		return nil
	})
	return []table{t}, err
}
