package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

func (p *program) releaseCommand() *cobra.Command {
	var vm vmFlags
	var recordDir string
	c := &cobra.Command{
		Use:   "release [VM]",
		Short: "Take the tracking of writes out of a running machine",
		Long: `Between captures, tracking stays armed in the QEMU process, so that the next one is an increment. Release takes it out
again: the process is then as it was before its first capture, and its next capture makes an increment by comparing
all of its memory with its last image.

Nothing else needs it: tracking ends with the process. The mark of a machine whose memory a restore has left half written stays,
and is told of.`,
		Args: between(0, "VM"),
		RunE: func(c *cobra.Command, args []string) error {
			which, err := vm.vm(argument(args, 0), p.getenv)
			if err != nil {
				return err
			}
			return p.release(c.Context(), jobs.ReleaseRequest{VM: which, RecordDir: recordDir})
		},
	}
	vm.selectorFlags(c)
	recordDirFlag(c, &recordDir)
	complete(c, false, machineNames)
	return c
}

func (p *program) release(ctx context.Context, r jobs.ReleaseRequest) error {
	process, err := r.VM.Find(ctx)
	if err != nil {
		return err
	}
	r.VM.PID = process.PID
	result, err := jobs.Release(ctx, r, jobs.Handlers[struct{}]{Started: p.workers.started})
	p.workers.ended()
	p.warnStopped(r.RecordDir, process)
	if err != nil {
		return endedMeanwhile(err, "its tracking went with it")
	}
	if result.MemoryInvalid != "" {
		p.warn("%s; the mark stays, and the machine must not run: repeat the restore, of this image or another, or end the QEMU", result.MemoryInvalid)
	}
	p.answer(result, func() {
		if result.Tracked {
			p.printf("tracking is taken out of %v\n", process)
		} else {
			p.printf("nothing was tracked in %v\n", process)
		}
	})
	return nil
}
