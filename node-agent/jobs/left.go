package jobs

import (
	"context"
	"errors"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// Left is how restores that did not come to their end, or have not yet, have left a machine, by what is noted on this node.
type Left struct {
	MemoryInvalid bool // its memory is half overwritten: it must not run
	Stopped       bool // it was stopped and not written to, and may stand still since
}

// HowLeft looks it up. A machine that is not here was left in no way. A mark that cannot be read counts: nobody knows that the memory is sound.
func HowLeft(ctx context.Context, vm VM, dir string) (Left, error) {
	process, err := vm.Find(ctx)
	if none := (*qemu.NoMatchError)(nil); errors.As(err, &none) {
		return Left{}, nil
	}
	if err != nil {
		return Left{}, err
	}
	if restore.Invalid(recordDir(dir), sessionOf(process)) != nil {
		return Left{MemoryInvalid: true}, nil
	}
	stop, err := restore.LeftStopped(recordDir(dir), sessionOf(process))
	return Left{Stopped: stop != nil}, err
}
