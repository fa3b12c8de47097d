package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// restoreJSON is the answer of restore: the result of package restore, and where the image came from.
type restoreJSON struct {
	*restore.Result
	Repository string `json:"repository"`
	VM         vmJSON `json:"vm"`

	Warnings []string `json:"warnings,omitempty"` // the result's, that disks are as they are, and that it was interrupted
}

func (p *program) restoreCommand() *cobra.Command {
	var vm vmFlags
	var r jobs.RestoreRequest
	c := &cobra.Command{
		Use:   "restore IMAGE [VM]",
		Short: "Put a machine back to the instant of an image",
		Long: `Restore puts the memory and the device state of an image into a QEMU on this host. The QEMU has to be the same machine,
as far as a guest could tell: machine type, CPU, memory size, devices. Where it is not, what differs is listed and nothing is touched.

It wants a machine that stands still, such as one that was started with -S. A running machine is rolled back with
--in-place: it is stopped, and all that it did since the image's instant is lost.

Every byte of the image is checked before the machine is touched. Afterwards all memory that was written since it was
put in is compared with the image. The machine stays paused, unless --run is given and all is well.

An interrupt ends the restore, and a machine that was stopped for it goes on. Once memory is being overwritten, the restore
comes to its end first; a second interrupt kills it, and leaves the machine paused with its memory invalid.

Disks are not restored yet: they have to be as they were at the image's instant before the machine runs.`,
		Example: `  vmckpt restore web-20260102t030405.678z web --run
  vmckpt restore web-20260102t030405.678z --pid 4242 --in-place --run`,
		Args: between(1, "IMAGE", "VM"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			r.Image = args[0]
			if r.VM, err = vm.vm(argument(args, 1), p.getenv); err != nil {
				return err
			}
			return p.restore(c.Context(), r)
		},
	}
	vm.selectorFlags(c)
	vm.monitorFlags(c)
	p.repositoryFlags(c)
	f := c.Flags()
	f.BoolVar(&r.InPlace, "in-place", false, "the machine may be running: stop it and throw away what it did since")
	f.BoolVar(&r.Run, "run", false, "let the machine run in the end, if all is well")
	f.BoolVar(&r.FullCompare, "full-compare", false, "compare all memory in the end, and not only what was written since it was put in")
	recordDirFlag(c, &r.RecordDir)
	complete(c, false, p.imageNames, machineNames)
	return c
}

func (p *program) restore(ctx context.Context, r jobs.RestoreRequest) (err error) {
	if err := image.CheckName(r.Image); err != nil {
		return &usageError{err}
	}
	if r.Repository, err = p.repositoryRequest(); err != nil {
		return err
	}
	process, err := r.VM.Find(ctx)
	if err != nil {
		return err
	}
	r.VM.PID = process.PID
	if err := p.look(); err != nil {
		return err
	}
	meter := p.meter()
	began := time.Now()
	p.workers.commits(func() bool { return r.Overwriting(process, began) })
	result, err := jobs.Restore(ctx, r, jobs.Handlers[restore.Progress]{
		Started:  p.workers.started,
		Progress: func(at restore.Progress) { meter.at(at.Phase, at.DoneBytes, at.TotalBytes) },
	})
	interrupted := ctx.Err() != nil
	p.workers.ended()
	meter.end()
	if codeOf(err) != jobs.CodeStopped { // which says it
		p.warnStopped(r.RecordDir, process)
	}
	if err != nil {
		return endedMeanwhile(err, "what the restore had begun went with it")
	}
	machine := p.machineOf(ctx, r.Image)
	answer := restoreJSON{
		Result: result, Repository: p.repository, VM: vmJSON{process.PID, process.Guest, process.UUID},
		Warnings: append(disksWarnings(machine), result.Warnings...),
	}
	if interrupted {
		const brought = "interrupted; the restore was brought to its end, since the machine's memory was being overwritten"
		p.tell("%s\n", brought)
		answer.Warnings = append(answer.Warnings, brought)
	}
	p.answer(answer, func() { p.printRestore(process, result, disksText(machine)) })
	return nil
}

// machineOf returns what an image says of its machine; nothing where it cannot be read, such as one that was deleted since.
func (p *program) machineOf(ctx context.Context, name string) json.RawMessage {
	repository, err := p.open()
	if err != nil {
		return nil
	}
	defer repository.Close()
	i, err := repository.Open(ctx, name)
	if err != nil {
		return nil
	}
	defer i.Close()
	return i.Manifest().Machine
}

func (p *program) printRestore(process *qemu.Process, r *restore.Result, disks string) {
	state := "stands still; `cont` or --run lets it run"
	if r.Resumed {
		state = "runs"
	}
	var phases []capture.Phase
	for _, phase := range r.Phases {
		phases = append(phases, capture.Phase(phase))
	}
	var again uint64
	for _, b := range r.PutAgain {
		again += b.Pages
	}
	tracking := "the next capture is an increment of this image by tracking"
	if r.Tracking != "" {
		tracking = "the next capture compares all memory: " + r.Tracking
	}
	list := []field{
		{"image", r.Image},
		{"machine", fmt.Sprintf("%v, %s", process, state)},
		{"memory", fmt.Sprintf("%s: %s from pages, %s uniform, %s cleared", sizeText(r.Memory.Bytes), sizeText(r.Memory.StoredBytes),
			sizeText(r.Memory.UniformBytes), sizeText(r.Memory.ZeroedBytes))},
		{"compared", fmt.Sprintf("%s pages after the load; %s put in again", countText(r.ComparedPages), countText(again))},
		{"took", durationText(r.Duration) + phasesText(phases)},
		{"tracking", tracking},
		{"disks", disks},
	}
	for _, d := range r.Tolerated {
		list = append(list, field{"differs", d.String()})
	}
	for _, w := range r.Warnings {
		list = append(list, field{"warning", w})
	}
	p.fields(list...)
}
