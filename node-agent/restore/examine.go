package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// block is a RAM block in the image and in the process.
type block struct {
	name   string
	layout int    // index in the process's layout
	hva    uint64 // in the process
	pages  uint64 // in the image

	// resized says that QEMU has the block at another length now, and gives it the image's as it loads the device state.
	resized bool
}

func (b block) address(page uint64) uint64 { return b.hva + page*pageset.PageBytes }

// resizable says of a block that its used length is part of the device state: QEMU's fw_cfg sets it as it is loaded (hw/nvram/fw_cfg.c,
// fw_cfg_acpi_mr_restore). They are the tables that the firmware fetches, and grow with what is plugged in.
func resizable(name string) bool {
	return slices.Contains([]string{"/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"}, name)
}

// examine looks at the machine and refuses what cannot be restored. It changes nothing.
func (r *restore) examine(ctx context.Context) error {
	m, p := r.target.Monitor, r.target.Process
	_, err := r.checkState(ctx, r.o.InPlace)
	if errors.Is(err, ErrNotPaused) {
		// That it runs is the smaller part of what is wrong with a machine that is marked.
		if invalid := new(InvalidMemoryError); errors.As(Invalid(r.o.RecordDir, r.target.session()), &invalid) {
			invalid.Err = fmt.Errorf("%w, and must not: stop it, or repeat the restore in place", err)
			return invalid
		}
	}
	if err != nil {
		return err
	}
	if r.layout, err = qemu.ReadLayout(ctx, m, p); err != nil {
		return err
	}
	if err := qemu.Supported(ctx, m, p, r.layout); err != nil {
		return err
	}
	present, err := qemu.Describe(ctx, m, p)
	if err != nil {
		return err
	}
	var recorded qemu.Machine
	if len(r.manifest.Machine) == 0 || string(r.manifest.Machine) == "null" {
		return errors.New("the image does not say which machine it was taken of")
	}
	if err := json.Unmarshal(r.manifest.Machine, &recorded); err != nil {
		return fmt.Errorf("read the machine that the image was taken of: %w", err)
	}
	mismatch := &MismatchError{Image: r.manifest.Name}
	for _, d := range qemu.Compare(recorded, present) {
		if d.Fatal {
			mismatch.Machine = append(mismatch.Machine, d)
		} else {
			r.result.Tolerated = append(r.result.Tolerated, d)
		}
	}
	var differences []BlockDifference
	r.blocks, differences = match(r.manifest.Blocks, r.layout)
	for _, d := range differences {
		// The comparison of the machines has named it already, unless the image contradicts itself.
		if !slices.ContainsFunc(mismatch.Machine, func(m qemu.Difference) bool { return m.What == "RAM block "+d.Name }) {
			mismatch.Blocks = append(mismatch.Blocks, d)
		}
	}
	if len(mismatch.Machine)+len(mismatch.Blocks) > 0 {
		return mismatch
	}
	r.machineType = present.Type
	r.dirtyBlocks, err = dirty.Blocks(ctx, r.target.Monitor, r.layout)
	return err
}

// checkState makes sure that the machine stands in a way in which it can be restored into, or runs where that is allowed.
func (r *restore) checkState(ctx context.Context, mayRun bool) (running bool, err error) {
	migration, err := qemu.Migration(ctx, r.target.Monitor)
	if err != nil {
		return false, err
	}
	state, err := qemu.Status(ctx, r.target.Monitor)
	if err != nil {
		return false, err
	}
	running = state == qemu.StateRunning
	if !migration.Status.Idle() || !standing(state) && !(running && mayRun) {
		return false, &StateError{State: state, Migration: migration.Status}
	}
	return running, nil
}

// standing says of a run state that the machine stands in it because nobody has started it yet, or somebody paused it. These are the states in
// which it may be restored into, and from which it may be continued after that: the guest that runs then is the image's. A machine that stands in any
// other state was taken away by a migration, or has failed in a way that a device state does not mend.
func standing(state qemu.RunState) bool {
	switch state {
	case qemu.StatePrelaunch, qemu.StatePaused, qemu.StateRestoreVM:
		return true
	}
	return false
}

// match finds each block of the image in the layout. Order does not matter, names and lengths do.
func match(recorded []image.BlockInfo, present qemu.Layout) ([]block, []BlockDifference) {
	var differences []BlockDifference
	left := make(map[string]int, len(present))
	for i, b := range present {
		left[b.Name] = i
	}
	blocks := make([]block, len(recorded))
	for i, b := range recorded {
		at, ok := left[b.Name]
		if !ok {
			differences = append(differences, BlockDifference{Name: b.Name, Image: b.Bytes})
			continue
		}
		delete(left, b.Name)
		resized := present[at].Bytes != b.Bytes
		if resized && !resizable(b.Name) {
			differences = append(differences, BlockDifference{Name: b.Name, Image: b.Bytes, Present: present[at].Bytes})
		}
		blocks[i] = block{name: b.Name, layout: at, hva: present[at].HVA, pages: b.Bytes / pageset.PageBytes, resized: resized}
	}
	for _, b := range present {
		if _, ok := left[b.Name]; ok {
			differences = append(differences, BlockDifference{Name: b.Name, Present: b.Bytes})
		}
	}
	return blocks, differences
}
