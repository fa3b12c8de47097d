package main

import (
	"context"
	"fmt"
	"time"

	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// The guest's own truth of a pause: it reads the processor's clock in a tight loop and keeps the longest time in which it did not. That has in
// it what an agent cannot see, time in which the guest had no processor among others.

// calibration is how long the ticks of the guest's clock are counted.
const calibration = 250 * time.Millisecond

// SetWriterParameters changes what the guest does, as that of the machine, and keeps it for noticed.
func (r *rig) SetWriterParameters(ctx context.Context, p writer.Parameters) error {
	r.now = p
	return r.Machine.SetWriterParameters(ctx, p)
}

// noticed is the longest time for which the guest did not run while something was done, by its own clock. Zero where its clock tells nothing: TCG's stands still with the machine.
func (r *rig) noticed(ctx context.Context, do func() error) (time.Duration, error) {
	if r.Options().Accel != machine.KVM {
		return 0, do()
	}
	p := r.now
	r.epoch++
	p.Clock, p.Epoch = true, r.epoch
	if err := r.SetWriterParameters(ctx, p); err != nil {
		return 0, err
	}
	begin, err := r.WaitWriter(ctx, func(s writer.Status) bool { return s.Epoch == p.Epoch && s.Clock != 0 })
	if err != nil {
		return 0, err
	}
	since := time.Now()
	if r.ticks == 0 {
		select {
		case <-time.After(calibration):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		now, _, err := r.WriterStatus(ctx)
		if err != nil {
			return 0, err
		}
		r.ticks = float64(now.Clock-begin.Clock) / float64(time.Since(since))
		if r.ticks <= 0 {
			return 0, fmt.Errorf("the guest's clock stands still")
		}
		return r.noticed(ctx, do) // without what the calibration saw
	}
	if err := do(); err != nil {
		return 0, err
	}
	end, _, err := r.WriterStatus(ctx)
	return time.Duration(float64(end.Gap) / r.ticks), err
}
