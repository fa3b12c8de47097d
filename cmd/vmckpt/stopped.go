package main

import (
	"time"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// warnStopped tells of a machine that a restore has stopped, and was killed together with whoever would have let it go on. Nothing else
// would: it looks like one that its owner paused.
func (p *program) warnStopped(recordDir string, process *qemu.Process) {
	stop, err := restore.LeftStopped(recordDir, dirty.Process{PID: process.PID, StartTime: process.StartTime})
	if err != nil {
		p.warn("%v", err)
	}
	if stop != nil {
		p.warn("a restore stopped %v at %s, and was killed before it wrote anything: if it still stands paused and its owner does not want that, "+
			"continue it (`cont`, `virsh resume`)", process, stop.Since.Format(time.RFC3339))
	}
}

// warn tells of what is no failure of the command.
func (p *program) warn(format string, args ...any) {
	p.tell("warning: "+format+"\n", args...)
}
