package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// reservedBytes at the beginning of memory are left to the guest itself.
const reservedBytes = writer.FirstGPA

// changedPages are 10 MB.
const changedPages = 10_000_000 / pageset.PageBytes

// rig is a machine with a repository.
type rig struct {
	*machine.Machine
	process *qemu.Process
	ram     qemu.RAMBlock // main memory
	memory  *pagetable.Memory

	repository jobs.Repository
	records    string
	dir        string
	images     int
	seed       uint64

	now   writer.Parameters // of the guest
	epoch uint64            // of what the guest notices
	ticks float64           // of its clock in a nanosecond
}

// newRig starts a machine, with an empty repository on the measured volume, or beneath dir.
func (b *bench) newRig(ctx context.Context, o machine.Options, dir string) (_ *rig, err error) {
	if dir == "" {
		dir = b.dir
	}
	o.QEMU, o.Accel = qemuVersion, b.stack.Accel
	r := &rig{}
	if r.Machine, err = machine.Launch(ctx, o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.process, err = qemu.Find(ctx, qemu.Selector{PID: r.PID}); err != nil {
		return nil, err
	}
	layout, err := qemu.ReadLayout(ctx, r.Monitor, r.process)
	if err != nil {
		return nil, err
	}
	for _, block := range layout {
		if block.Bytes > r.ram.Bytes {
			r.ram = block
		}
	}
	if r.memory, err = pagetable.OpenMemory(r.PID); err != nil {
		return nil, err
	}
	if r.dir, err = os.MkdirTemp(dir, "rig-"); err != nil {
		return nil, err
	}
	r.repository = jobs.Repository{Dir: filepath.Join(r.dir, "repository"), KeyFile: filepath.Join(r.dir, "keys")}
	r.records = filepath.Join(r.dir, "records")
	if _, err := image.NewKeyFile(r.repository.KeyFile, false); err != nil {
		return nil, err
	}
	if err := os.Mkdir(r.repository.Dir, 0o700); err != nil {
		return nil, err
	}
	return r, image.InitRepository(r.repository.Dir)
}

func (r *rig) close() error {
	if r.memory != nil {
		r.memory.Close()
	}
	err := r.Machine.Close()
	if r.dir != "" {
		err = errors.Join(err, os.RemoveAll(r.dir))
	}
	return err
}

// fill writes content into all memory but what is the guest's own.
func (r *rig) fill(c content) error {
	for at := uint64(reservedBytes); at < r.ram.Bytes; {
		n := min(uint64(len(c)), r.ram.Bytes-at)
		if err := r.memory.Write(c[:n], r.ram.HVA+at); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// filledBytes is how much fill writes.
func (r *rig) filledBytes() uint64 { return r.ram.Bytes - reservedBytes }

// taken is what a checkpoint was, with what only the outside knows.
type taken struct {
	*capture.Result
	wall time.Duration // the worker's start included

	workerPeak, childPeak int64 // bytes, see watchMemory
}

// capture takes a checkpoint by a worker process.
func (r *rig) capture(ctx context.Context, mode capture.Mode, how image.Compression) (taken, error) {
	return r.captureAt(ctx, capture.Late, mode, how)
}

// captureAt takes one that is late or early.
func (r *rig) captureAt(ctx context.Context, when capture.When, mode capture.Mode, how image.Compression) (taken, error) {
	r.images++
	var watch *memoryWatch
	begin := time.Now()
	result, err := jobs.Capture(ctx, jobs.CaptureRequest{
		VM: jobs.VM{PID: r.PID, QMPSocket: r.Socket}, Repository: r.repository,
		Name: fmt.Sprintf("image-%d", r.images), Mode: mode, Instant: when, Compression: how, RecordDir: r.records,
	}, jobs.Handlers[capture.Progress]{Started: func(pid int) { watch = watchMemory(pid) }})
	t := taken{Result: result, wall: time.Since(begin)}
	if watch != nil {
		t.workerPeak, t.childPeak = watch.end()
	}
	return t, err
}

// newest names the image taken last.
func (r *rig) newest() string { return fmt.Sprintf("image-%d", r.images) }

// clear deletes all images.
func (r *rig) clear(ctx context.Context) error {
	return r.withRepository(func(repository *image.Repository) error {
		images, err := repository.Images(ctx)
		if err != nil {
			return err
		}
		for _, i := range images {
			if err := repository.Delete(ctx, i.Name); err != nil {
				return err
			}
		}
		return nil
	})
}

func (r *rig) withRepository(do func(*image.Repository) error) error {
	repository, err := r.repository.Open()
	if err != nil {
		return err
	}
	defer repository.Close()
	return do(repository)
}

// quiet are the parameters with which the bare-metal guest runs and changes its own account only: it looks for new parameters some
// thousand times a second.
func (r *rig) quiet() writer.Parameters {
	p := r.WriterParameters()
	p.Random, p.Whole, p.PagesPerPass, p.Spin = true, true, 0, 100_000
	return p
}

// changeSpin keeps the guest from its next pass for half a second or so, at its best.
const changeSpin = 2_000_000_000

// change lets the guest's processor change 10 MB, scattered over all memory. The guest is quiet, and a busy one, when it returns.
func (r *rig) change(ctx context.Context) error {
	quiet := r.quiet()
	if err := r.SetWriterParameters(ctx, quiet); err != nil {
		return err
	}
	before, _, err := r.WriterStatus(ctx)
	if err != nil {
		return err
	}
	// Two passes: a spin of the change before may be under way.
	before, err = r.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes >= before.Passes+2 })
	if err != nil {
		return err
	}
	write := quiet
	write.PagesPerPass, write.Spin = changedPages, changeSpin
	if err := r.SetWriterParameters(ctx, write); err != nil {
		return err
	}
	after, err := r.WaitWriter(ctx, func(s writer.Status) bool { return s.Pages >= before.Pages+changedPages })
	if err != nil {
		return err
	}
	if err := r.SetWriterParameters(ctx, quiet); err != nil {
		return err
	}
	if n := after.Pages - before.Pages; n != changedPages {
		return fmt.Errorf("the guest changed %d pages, not %d", n, changedPages)
	}
	return nil
}

// poke changes 10 MB from outside, single pages evenly over all memory, as a device of QEMU's would: for a guest that is idle.
func (r *rig) poke(c content) error {
	r.seed++
	pages := r.filledBytes() / pageset.PageBytes
	for i := range uint64(changedPages) {
		at := reservedBytes + (i*pages/changedPages+r.seed%(pages/changedPages))*pageset.PageBytes
		from := (i + r.seed*7919) * pageset.PageBytes % uint64(len(c))
		if err := r.memory.Write(c[from:from+pageset.PageBytes], r.ram.HVA+at); err != nil {
			return err
		}
	}
	return nil
}
