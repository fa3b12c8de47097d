package restore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/qemu/carrier"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// carrierName is the memory file's name inside QEMU.
const carrierName = "vmckpt-restore"

// injectBound is how long QEMU's main thread may take to come to where system calls can be put into it.
const injectBound = 5 * time.Second

// vehicle is the memory file inside QEMU that device states are loaded from.
type vehicle struct {
	pid    int
	remote inject.RemoteFile
	local  *os.File
}

// openVehicle makes the file.
func openVehicle(ctx context.Context, p *qemu.Process) (*vehicle, error) {
	remote, err := inject.NewMemfd(ctx, p.PID, carrierName)
	if err != nil {
		return nil, fmt.Errorf("make a memory file in %v: %w", p, err)
	}
	v := &vehicle{pid: p.PID, remote: remote}
	if v.local, err = remote.Duplicate(p.PID); err != nil {
		return nil, errors.Join(fmt.Errorf("open the memory file in %v: %w", p, err), v.close())
	}
	return v, nil
}

// closeLeftovers closes the memory files of restores that were killed. It is called after a load only: that has removed what block node
// an earlier one had left, and with it QEMU's own descriptor of the earlier file, which looks the same as ours.
func (v *vehicle) closeLeftovers(ctx context.Context) error {
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", v.pid))
	if err != nil {
		return fmt.Errorf("look for memory files of an earlier restore: %w", err)
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			continue
		}
		file, err := inject.Identify(v.pid, fd)
		if err != nil || file == v.remote || file.Link != v.remote.Link {
			continue
		}
		if err := inject.CloseFD(ctx, v.pid, file); err != nil && !errors.Is(err, inject.ErrIdentity) {
			return fmt.Errorf("close the memory file of an earlier restore: %w", err)
		}
	}
	return nil
}

// load resets the machine and loads a device state.
func (v *vehicle) load(ctx context.Context, m qemu.Monitor, state []byte, tag string) error {
	if err := v.local.Truncate(0); err != nil {
		return fmt.Errorf("fill the memory file: %w", err)
	}
	// By offset: the descriptor is QEMU's own, and so is its position.
	if err := carrier.Write(io.NewOffsetWriter(v.local, 0), state, tag, time.Now()); err != nil {
		return fmt.Errorf("fill the memory file: %w", err)
	}
	return qemu.LoadDeviceState(ctx, m, fmt.Sprintf("/proc/self/fd/%d", v.remote.FD), tag)
}

// close closes the file in QEMU, also when the restore was cancelled.
func (v *vehicle) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), injectBound)
	defer cancel()
	var err error
	if v.local != nil {
		err = v.local.Close()
	}
	closeErr := inject.CloseFD(ctx, v.pid, v.remote)
	if errors.Is(closeErr, inject.ErrIdentity) || errors.Is(closeErr, inject.ErrGone) {
		closeErr = nil
	}
	return errors.Join(err, closeErr)
}

// noDevices is a device state without any device: to load it is to reset the machine, and nothing else.
func noDevices(machineType string) ([]byte, error) {
	stream := []byte("QEVM") // QEMU, migration/savevm.c: magic, version 3, QEMU_VM_EOF
	stream = binary.BigEndian.AppendUint32(stream, 3)
	return devstate.Loadable(append(stream, 0), machineType)
}
