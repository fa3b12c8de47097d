package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// sweepJSON is the answer of sweep.
type sweepJSON struct {
	Repository string   `json:"repository"`
	Removed    []string `json:"removed"` // paths in the repository
	Younger    int      `json:"younger"` // left alone, since they are not old enough
	Bytes      int64    `json:"youngerBytes"`
	Foreign    []string `json:"foreign"`   // paths of what VMckpt did not put there: left alone
	Processes  int      `json:"processes"` // that are gone, and had records on this host
}

func (p *program) sweepCommand() *cobra.Command {
	var olderThan time.Duration
	var recordDir string
	c := &cobra.Command{
		Use:   "sweep",
		Short: "Remove what captures left behind that were killed",
		Long: `Sweep removes half-written images of captures that were killed, and this host's records of machines that have ended.

Images of captures under way are never touched: each is locked by its writer. On volumes that several hosts write to and
that do not carry locks from one to the other (some NFS mounts), the age is what keeps them apart: let it be longer than
the longest capture.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return p.sweep(c.Context(), olderThan, recordDir) },
	}
	p.repositoryFlags(c)
	recordDirFlag(c, &recordDir)
	c.Flags().DurationVar(&olderThan, "older-than", time.Hour, "leave alone what is younger than this `TIME`")
	c.Flags().Lookup("older-than").DefValue = spanText(time.Hour)
	return c
}

func (p *program) sweep(ctx context.Context, olderThan time.Duration, recordDir string) error {
	repository, err := p.open()
	if err != nil {
		return err
	}
	defer repository.Close()
	removed, err := repository.Sweep(ctx, olderThan)
	if err != nil {
		return err
	}
	answer := sweepJSON{Repository: p.repository, Removed: append([]string{}, removed...), Foreign: []string{}}
	left, err := repository.Leftovers(ctx)
	if err != nil {
		return err
	}
	for _, l := range left {
		switch {
		case l.Foreign:
			answer.Foreign = append(answer.Foreign, l.Path)
		case !l.Alive:
			answer.Younger++
			answer.Bytes += l.Bytes
		}
	}
	records, err := dirty.Sweep(recordDir)
	if err != nil {
		return err
	}
	marks, err := restore.Sweep(recordDir)
	if err != nil {
		return err
	}
	stops, err := restore.Stops(recordDir)
	if err != nil {
		return err
	}
	for _, stop := range stops {
		process, err := qemu.Find(ctx, qemu.Selector{PID: stop.Process.PID})
		if err == nil && process.StartTime == stop.Process.StartTime {
			p.warnStopped(recordDir, process)
		}
	}
	answer.Processes = max(records, marks)
	p.answer(answer, func() {
		for _, path := range removed {
			p.printf("%s removed\n", path)
		}
		switch {
		case answer.Younger > 0:
			nothing := "left alone"
			if len(removed) == 0 {
				nothing = "nothing older than " + spanText(olderThan)
			}
			p.printf("%s; %d younger, %s: --older-than 0s removes what no capture under way has\n", nothing, answer.Younger, sizeText(answer.Bytes))
		case len(removed) == 0:
			p.printf("nothing half-written is left behind\n")
		}
		for _, path := range answer.Foreign {
			p.printf("%s left alone: VMckpt did not put it there\n", path)
		}
		if answer.Processes > 0 {
			p.printf("records of machines that have ended removed: %d\n", answer.Processes)
		}
	})
	return nil
}
