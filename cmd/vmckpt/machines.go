package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// machinesJSON is the answer of machines.
type machinesJSON struct {
	Machines []machineJSON `json:"machines"` // by process id
}

// machineJSON is what this host knows of a machine.
type machineJSON struct {
	vmJSON
	TrackedSince  string       `json:"trackedSince,omitempty"`  // the image that the next increment is found from by page tables
	NotTracked    string       `json:"notTracked,omitempty"`    // why there is no such image
	MemoryInvalid string       `json:"memoryInvalid,omitempty"` // what is wrong, where a restore did not finish
	StoppedSince  *time.Time   `json:"stoppedSince,omitempty"`  // a restore stopped it then, and was killed before it wrote anything
	Busy          bool         `json:"busy,omitempty"`          // somebody is at work on it
	BusyWith      int          `json:"busyWith,omitempty"`      // that process, where it is known
	Error         *failureJSON `json:"error,omitempty"`         // not all could be looked at
}

func (p *program) machinesCommand() *cobra.Command {
	var recordDir string
	c := &cobra.Command{
		Use:   "machines",
		Short: "List the machines of this host, and what is known of them",
		Long: `Machines lists every QEMU that runs on this host and that this user can see: since which image its writes are tracked, whether
a restore has left its memory invalid, or stopped it and was killed, and which process is at work on it.

It looks at processes and at this host's records alone. No monitor is asked, so that it is never in the way of others;
whether a guest runs or is paused it does not tell.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return p.machines(c.Context(), recordDir) },
	}
	recordDirFlag(c, &recordDir)
	return c
}

func (p *program) machines(ctx context.Context, recordDir string) error {
	all, err := qemu.All(ctx)
	if err != nil {
		return err
	}
	answer := machinesJSON{Machines: []machineJSON{}}
	var errs []error
	for _, process := range all {
		m, err := lookAt(process, recordDir)
		if err != nil {
			errs = append(errs, err)
			m.Error = describe(err)
		}
		answer.Machines = append(answer.Machines, m)
	}
	p.answer(answer, func() { p.printMachines(answer) })
	return p.several(errs)
}

// lookAt gathers what this host knows of a machine.
func lookAt(process *qemu.Process, recordDir string) (machineJSON, error) {
	m := machineJSON{vmJSON: vmJSON{process.PID, process.Guest, process.UUID}}
	session := dirty.Process{PID: process.PID, StartTime: process.StartTime}
	var errs []error
	tracked, err := dirty.Look(recordDir, session)
	var unknown *dirty.UnknownError
	switch {
	case errors.As(err, &unknown):
		m.NotTracked = unknown.Reason
	case err != nil:
		errs = append(errs, err)
	default:
		m.TrackedSince = tracked.Name
	}
	var invalid *restore.InvalidMemoryError
	if err := restore.Invalid(recordDir, session); errors.As(err, &invalid) {
		m.MemoryInvalid = invalid.Error()
	} else if err != nil {
		errs = append(errs, err)
	}
	if stop, err := restore.LeftStopped(recordDir, session); err != nil {
		errs = append(errs, err)
	} else if stop != nil {
		m.StoppedSince = &stop.Since
	}
	var busy *dirty.BusyError
	if err := dirty.Busy(recordDir, session); errors.As(err, &busy) {
		m.Busy, m.BusyWith = true, busy.Holder
	} else if err != nil {
		errs = append(errs, err)
	}
	return m, firstOf(errs, process)
}

// firstOf returns the first error: those after it come of the same, a directory that cannot be read. A machine that has ended is none.
func firstOf(errs []error, process *qemu.Process) error {
	if len(errs) == 0 || !process.Alive() {
		return nil
	}
	return errs[0]
}

func (p *program) printMachines(answer machinesJSON) {
	if len(answer.Machines) == 0 {
		p.printf("no QEMU is seen on this host\n")
		return
	}
	rows := [][]string{{"PID", "MACHINE", "UUID", "TRACKED SINCE", ""}}
	for _, m := range answer.Machines {
		note := ""
		switch {
		case m.Busy && m.BusyWith == 0:
			note = "somebody is at work on it"
		case m.Busy:
			note = fmt.Sprintf("process %d is at work on it", m.BusyWith)
		case m.MemoryInvalid != "":
			note = "MEMORY INVALID: it must not run until a restore has finished"
		case m.StoppedSince != nil:
			note = "a restore stopped it at " + timeText(*m.StoppedSince) + ", and was killed"
		case m.Error != nil:
			note = "not all is known"
		}
		rows = append(rows, []string{strconv.Itoa(m.PID), orDash(m.Guest), orDash(m.UUID), orDash(m.TrackedSince), note})
	}
	p.table(rows)
}
