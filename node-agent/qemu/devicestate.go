package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// SaveDeviceState makes QEMU write everything that is not RAM to filename, in one command: it stops the VM, drains I/O,
// writes, and starts the VM again if it was running. QEMU waits with its big lock held for whoever reads filename, and
// during that nothing can resume, change or migrate the VM.
//
// filename is opened by QEMU, in its own file system. A reader that is gone gives a *QMPError here, and the VM runs on.
// A ctx that ends stops the waiting and nothing else: closing the reading end is what ends the command.
func SaveDeviceState(ctx context.Context, m Monitor, filename string) error {
	args := struct {
		Filename string `json:"filename"`
		// Live leaves the disks of a stopped VM inactivated where it is true, as for a VM that has moved away.
		Live bool `json:"live"`
	}{filename, false}
	if err := m.Execute(ctx, "xen-save-devices-state", args, nil); err != nil {
		return fmt.Errorf("save the device state to %s: %w", filename, err)
	}
	return nil
}

// LoadError is QEMU's refusal of a device state. The VM has been reset and stands still; QEMU lives.
type LoadError struct {
	Tag  string
	Desc string // QEMU's words
}

func (e *LoadError) Error() string { return fmt.Sprintf("load device state %q: %s", e.Tag, e.Desc) }

// loadName names the block node and the job of a load. A VM is loaded once at a time, and a left-over of an earlier
// attempt that died is removed by that name.
const loadName = "vmckpt-load"

// jobPoll is how often a job is looked at. It is asked rather than awaited by events: an event can be lost, an answer not.
const jobPoll = 2 * time.Millisecond

// LoadDeviceState resets the machine and loads the device state that the qcow2 image filename holds as the vmstate of its
// internal snapshot tag (package carrier writes such images). The VM must stand still; RAM must be in its place already,
// since some devices read it while they load.
//
// filename is opened by QEMU, in its own file system; /proc/self/fd/N of a memfd will do.
func LoadDeviceState(ctx context.Context, m Monitor, filename, tag string) (err error) {
	if err := clearLoad(ctx, m); err != nil {
		return fmt.Errorf("clear an earlier load away: %w", err)
	}
	type node map[string]any
	add := node{
		"driver": "qcow2", "node-name": loadName,
		"file": node{"driver": "file", "filename": filename, "locking": "off"},
	}
	if err := m.Execute(ctx, "blockdev-add", add, nil); err != nil {
		return fmt.Errorf("open the carrier %s in qemu: %w", filename, err)
	}
	defer func() {
		// Also when ctx has ended: the node must not stay behind. clearLoad at the next load is the second chance.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if clearErr := clearLoad(ctx, m); clearErr != nil {
			err = errors.Join(err, fmt.Errorf("clear the load away: %w", clearErr))
		}
	}()
	load := node{"job-id": loadName, "tag": tag, "vmstate": loadName, "devices": []string{loadName}}
	if err := m.Execute(ctx, "snapshot-load", load, nil); err != nil {
		return fmt.Errorf("start the load: %w", err)
	}
	for {
		j, err := queryJob(ctx, m, loadName)
		switch {
		case err != nil:
			return err
		case j == nil:
			return errors.New("the load's job is gone; its outcome is not known")
		case j.Status == "concluded" && j.Error != "":
			return &LoadError{Tag: tag, Desc: j.Error}
		case j.Status == "concluded":
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the load: %w", ctx.Err())
		case <-time.After(jobPoll):
		}
	}
}

type job struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Error  string `json:"error"`
}

// queryJob returns nil where there is no such job.
func queryJob(ctx context.Context, m Monitor, id string) (*job, error) {
	var jobs []job
	if err := m.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, fmt.Errorf("ask for the job's state: %w", err)
	}
	for _, j := range jobs {
		if j.ID == id {
			return &j, nil
		}
	}
	return nil, nil
}

// clearLoad dismisses the job of a load, once it is concluded, and removes the block node. Both may be missing.
func clearLoad(ctx context.Context, m Monitor) error {
	for {
		j, err := queryJob(ctx, m, loadName)
		if err != nil {
			return err
		}
		if j == nil {
			break
		}
		if j.Status == "concluded" {
			if err := m.Execute(ctx, "job-dismiss", map[string]string{"id": loadName}, nil); err != nil {
				return fmt.Errorf("dismiss job %s: %w", loadName, err)
			}
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of job %s (%s): %w", loadName, j.Status, ctx.Err())
		case <-time.After(jobPoll):
		}
	}
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := m.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return fmt.Errorf("list block nodes: %w", err)
	}
	for _, n := range nodes {
		if n.Name == loadName {
			if err := m.Execute(ctx, "blockdev-del", map[string]string{"node-name": loadName}, nil); err != nil {
				return fmt.Errorf("remove block node %s: %w", loadName, err)
			}
		}
	}
	return nil
}
