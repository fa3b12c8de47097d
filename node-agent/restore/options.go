package restore

import (
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Target is the machine that an image is restored into.
type Target struct {
	Process *qemu.Process
	Monitor qemu.Monitor
}

// session names the process as session records do.
func (t Target) session() dirty.Process {
	return dirty.Process{PID: t.Process.PID, StartTime: t.Process.StartTime}
}

// Options say how an image is restored. The zero value restores into a machine that stands still, and leaves it so.
type Options struct {
	// InPlace allows a machine that runs to be stopped, and what it is doing to be lost.
	InPlace bool

	// Run continues the machine when all is well.
	Run bool

	// FullCompare compares all memory with the image in the end, in place of what was written since it was put in.
	FullCompare bool

	// SkipVerify leaves out reading the whole image before the machine is touched. Damage then shows in the middle, when the machine's
	// memory is lost already: it is for callers that have verified the image a moment ago.
	SkipVerify bool

	// RecordDir is where the node keeps session records and the marks of invalid memory; default [dirty.DefaultRecordDir].
	RecordDir string

	// Parallel is how many threads put memory in; default one for each processor.
	Parallel int

	// Settle is how long a machine that was stopped here must stay so before it is touched; default 100 ms. Some managers of
	// machines resume what they did not stop themselves: virt-launcher within 10 to 57 ms (measured).
	Settle time.Duration

	// Progress is called with where the restore stands, by one goroutine at a time, ten times a second at the most.
	Progress func(Progress)

	// Hooks are for tests.
	Hooks Hooks
}

// Hooks let a test look and interfere. Each may be nil; an error ends the restore.
type Hooks struct {
	// Step is called at each named step, see [Steps].
	Step func(Step) error

	// Write is called before memory is written, from several goroutines.
	Write func(block string, run pageset.Run) error

	// Harvested is called after the load, each time between taking what was written and starting over.
	Harvested func() error
}

// Step names a point in the course of a restore.
type Step string

// The steps, in order.
const (
	StepVerified Step = "verified" // the image is sound; the machine was not looked at
	StepExamined Step = "examined" // and fits; nothing was changed
	StepLocked   Step = "locked"
	StepStopped  Step = "stopped"
	StepMarked   Step = "marked" // the machine's memory counts as invalid
	StepReset    Step = "reset"
	StepMemory   Step = "memory"  // is in
	StepArmed    Step = "armed"   // what is written from now on shows
	StepLoaded   Step = "loaded"  // the device state
	StepSettled  Step = "settled" // memory is as the image says
	StepCompared Step = "compared"
	StepUnmarked Step = "unmarked"
	StepRunning  Step = "running"
)

// Steps are all steps in order. The last one is reached with Options.Run.
var Steps = []Step{
	StepVerified, StepExamined, StepLocked, StepStopped, StepMarked, StepReset, StepMemory, StepArmed, StepLoaded, StepSettled,
	StepCompared, StepUnmarked, StepRunning,
}

func (o Options) withDefaults() Options {
	if o.RecordDir == "" {
		o.RecordDir = dirty.DefaultRecordDir
	}
	if o.Settle == 0 {
		o.Settle = 100 * time.Millisecond
	}
	return o
}

// step tells the test's hook where the restore stands.
func (o Options) step(s Step) error {
	if o.Hooks.Step == nil {
		return nil
	}
	return o.Hooks.Step(s)
}

// harvested calls the test's hook.
func (o Options) harvested() error {
	if o.Hooks.Harvested == nil {
		return nil
	}
	return o.Hooks.Harvested()
}
