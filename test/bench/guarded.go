package main

import (
	"context"
	"fmt"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/test/machine"
)

// How the guest writes while it is guarded: bursts of pages all over its memory, and its processor busy in between.
const (
	busyPages = 64
	busySpin  = 100_000
	// undisturbed is how long its speed is measured without a checkpoint.
	undisturbed = 2 * time.Second
)

// guarded sets bases of a guest that writes all the time, taken early and late, beside QEMU's copy-on-write.
func guarded(ctx context.Context, b *bench) ([]table, error) {
	code, err := programCode(ctx)
	if err != nil {
		return nil, err
	}
	t := table{
		Title: "Copy-on-write",
		Text: "Bases of a guest of 4 GiB, full of program code, that writes to pages all over its memory all the time. Pauses are the sum of all for that checkpoint, by QEMU's own stamps. " +
			"The guest's speed is how many pages it wrote per second from the beginning of the save to its end, in per cent of the seconds before. S2.",
		Columns: []string{"", "pauses", "longest gap, by the guest", "time", "guest's speed", "pages caught"},
	}
	goals := table{Title: "Copy-on-write: goals"}
	pauses := goals.figure("pauses of an early base, 4 GiB, together", milliseconds, atMost(30))
	err = b.with(ctx, machine.Options{Guest: machine.Writer{}, MemoryBytes: 4 * machine.GiB}, "", func(r *rig) error {
		if err := r.fill(code); err != nil {
			return err
		}
		busy := r.quiet()
		busy.PagesPerPass, busy.Spin, busy.Clock = busyPages, busySpin, true
		if err := r.SetWriterParameters(ctx, busy); err != nil {
			return err
		}
		for _, when := range []capture.When{capture.Early, capture.Late} {
			cells := t.row(fmt.Sprintf("VMckpt, %s", when), milliseconds, milliseconds, seconds, percent, count)
			for range b.runs {
				if err := r.clear(ctx); err != nil {
					return err
				}
				var taken taken
				speed, gap, err := r.speed(ctx, func() (err error) {
					taken, err = r.captureAt(ctx, when, capture.Full, image.S2)
					return err
				})
				if err != nil {
					return err
				}
				if when == capture.Early {
					pauses.add(inMilliseconds(taken.Downtime))
				}
				cells[0].add(inMilliseconds(taken.Downtime))
				cells[1].add(inMilliseconds(gap))
				cells[2].add(taken.wall.Seconds())
				cells[3].add(speed)
				if g := taken.Guard; g != nil {
					cells[4].add(float64(g.Caught))
				} else {
					cells[4].add(0)
				}
			}
		}
		if _, err := jobs.Release(ctx, jobs.ReleaseRequest{VM: jobs.VM{PID: r.PID, QMPSocket: r.Socket}, RecordDir: r.records}, jobs.Handlers[struct{}]{}); err != nil {
			return err
		}
		if err := r.clear(ctx); err != nil {
			return err
		}
		n, err := newNative(ctx, r)
		if err != nil {
			return err
		}
		cells := t.row("`migrate` with `background-snapshot` to a file", milliseconds, milliseconds, seconds, percent, count)
		for range b.runs {
			three := []*cell{cells[0], cells[2], {}}
			speed, gap, err := r.speed(ctx, func() error { return n.measure(ctx, n.backgroundSnapshot, three) })
			if err != nil {
				return err
			}
			cells[1].add(inMilliseconds(gap))
			cells[3].add(speed)
		}
		return nil
	})
	return []table{t, goals}, err
}

// speed is how fast the guest writes while something is done, in per cent of its speed before, and what it notices of it.
func (r *rig) speed(ctx context.Context, do func() error) (_ float64, gap time.Duration, err error) {
	rate := func(work func() error) (float64, error) {
		before, _, err := r.WriterStatus(ctx)
		if err != nil {
			return 0, err
		}
		begin := time.Now()
		if err := work(); err != nil {
			return 0, err
		}
		took := time.Since(begin)
		after, _, err := r.WriterStatus(ctx)
		if err != nil {
			return 0, err
		}
		return float64(after.Pages-before.Pages) / took.Seconds(), nil
	}
	alone, err := rate(func() error {
		select {
		case <-time.After(undisturbed):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if err != nil {
		return 0, 0, err
	}
	if alone == 0 {
		return 0, 0, fmt.Errorf("the guest does not write")
	}
	gap, err = r.noticed(ctx, func() error {
		meanwhile, err := rate(do)
		alone = 100 * meanwhile / alone
		return err
	})
	return alone, gap, err
}
