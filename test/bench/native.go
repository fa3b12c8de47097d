package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
)

// native sets checkpoints beside QEMU's own ways of saving the same machine.
func native(ctx context.Context, b *bench) ([]table, error) {
	code, err := programCode(ctx)
	if err != nil {
		return nil, err
	}
	t := table{
		Title: "Beside QEMU's own ways",
		Text: "The same guest of 1 GiB, full of program code, its processor busy. The pause is from QEMU's STOP to its RESUME by its own stamps, the sum where there are several; " +
			"the time is until everything is synced; bytes are what the files take of the volume. QEMU's migrations may use all of the bandwidth. Increments as above, 10 MB changed.",
		Columns: []string{"", "pause", "longest gap, by the guest", "time", "bytes"},
	}
	err = b.with(ctx, machine.Options{Guest: machine.Writer{}, MemoryBytes: machine.GiB}, "", func(r *rig) error {
		if err := r.SetWriterParameters(ctx, r.quiet()); err != nil {
			return err
		}
		if err := r.fill(code); err != nil {
			return err
		}
		for _, how := range []image.Compression{image.Zstd, image.S2} {
			cells := t.row(fmt.Sprintf("VMckpt, base, %v", how), milliseconds, milliseconds, seconds, megabytes)
			for range b.runs {
				if err := r.clear(ctx); err != nil {
					return err
				}
				if err := r.ours(ctx, capture.Full, how, cells); err != nil {
					return err
				}
			}
			cells = t.row(fmt.Sprintf("VMckpt, increment, %v", how), milliseconds, milliseconds, seconds, megabytes)
			for range b.runs {
				if err := r.change(ctx); err != nil {
					return err
				}
				if err := r.ours(ctx, capture.Incremental, how, cells); err != nil {
					return err
				}
			}
		}
		// Their userfaultfd and ours do not go together.
		if _, err := jobs.Release(ctx, jobs.ReleaseRequest{VM: jobs.VM{PID: r.PID, QMPSocket: r.Socket}, RecordDir: r.records}, jobs.Handlers[struct{}]{}); err != nil {
			return err
		}
		n, err := newNative(ctx, r)
		if err != nil {
			return err
		}
		for _, way := range []struct {
			name string
			save func(context.Context, string) error
		}{
			{"`snapshot-save` into a qcow2", n.snapshotSave},
			{"`migrate` with `background-snapshot` to a file", n.backgroundSnapshot},
			{"`stop`, `migrate` to a file, `cont`", n.migrateStopped},
		} {
			cells := t.row(way.name, milliseconds, milliseconds, seconds, megabytes)
			for range b.runs {
				gap, err := r.noticed(ctx, func() error { return n.measure(ctx, way.save, []*cell{cells[0], cells[2], cells[3]}) })
				if err != nil {
					return fmt.Errorf("%s: %w", way.name, err)
				}
				cells[1].add(inMilliseconds(gap))
			}
		}
		return nil
	})
	return []table{t}, err
}

// ours takes a checkpoint for the comparison.
func (r *rig) ours(ctx context.Context, mode capture.Mode, how image.Compression, cells []*cell) error {
	var taken taken
	gap, err := r.noticed(ctx, func() (err error) {
		taken, err = r.capture(ctx, mode, how)
		return err
	})
	if err != nil {
		return err
	}
	own, err := r.ownBytes()
	if err != nil {
		return err
	}
	cells[0].add(inMilliseconds(taken.Downtime))
	cells[1].add(inMilliseconds(gap))
	cells[2].add(taken.wall.Seconds())
	cells[3].add(float64(own) / 1e6)
	return nil
}

// qemuWays saves a machine by QEMU's own means.
type qemuWays struct {
	*rig
	monitor qemu.Monitor
	disk    string // a qcow2, for internal snapshots
	taken   int
}

// diskNode is the block node of the disk: no device has it, which is no matter for a snapshot.
const diskNode = "bench-disk"

// newNative adds a disk for snapshots, and lets migrations use what bandwidth there is.
func newNative(ctx context.Context, r *rig) (*qemuWays, error) {
	n := &qemuWays{rig: r, monitor: r.Monitor, disk: filepath.Join(r.dir, "disk.qcow2")}
	if out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", n.disk, "1M").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make a disk for snapshots: %w: %s", err, out)
	}
	err := n.monitor.Execute(ctx, "blockdev-add", map[string]any{
		"driver": "qcow2", "node-name": diskNode, "file": map[string]any{"driver": "file", "filename": n.disk},
	}, nil)
	if err != nil {
		return nil, err
	}
	return n, n.monitor.Execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": uint64(1) << 40}, nil)
}

// measure saves once, into a file that is gone afterwards.
func (n *qemuWays) measure(ctx context.Context, save func(context.Context, string) error, cells []*cell) error {
	n.taken++
	path := filepath.Join(n.dir, fmt.Sprintf("saved-%d", n.taken))
	defer os.Remove(path)
	events := n.monitor.Subscribe("STOP", "RESUME")
	defer events.Close()
	before := allocated(n.disk)
	begin := time.Now()
	if err := save(ctx, path); err != nil {
		return err
	}
	for _, name := range []string{path, n.disk} {
		if err := syncFile(name); err != nil {
			return err
		}
	}
	cells[1].add(time.Since(begin).Seconds())
	cells[2].add(float64(allocated(path)+allocated(n.disk)-before) / 1e6)
	pause, err := stood(events)
	if err != nil {
		return err
	}
	cells[0].add(inMilliseconds(pause))
	return n.deleteSnapshots(ctx)
}

// stood adds up how long the machine stood, by the events so far. It runs.
func stood(events *qemu.Subscription) (sum time.Duration, err error) {
	var since time.Time
	seen := false
	for {
		select {
		case e, ok := <-events.C:
			if !ok {
				return sum, qemu.ErrEventsLost
			}
			if e.Name == "STOP" {
				since = e.Time
			} else if !since.IsZero() {
				sum, since, seen = sum+e.Time.Sub(since), time.Time{}, true
			}
		case <-time.After(100 * time.Millisecond):
			if !seen || !since.IsZero() {
				return sum, fmt.Errorf("QEMU did not tell both of stopping and of resuming the machine")
			}
			return sum, nil
		}
	}
}

// snapshotSave saves into the disk; path is not used.
func (n *qemuWays) snapshotSave(ctx context.Context, _ string) error {
	return n.job(ctx, "snapshot-save", map[string]any{"tag": "bench", "vmstate": diskNode, "devices": []string{diskNode}})
}

func (n *qemuWays) deleteSnapshots(ctx context.Context) error {
	if err := n.job(ctx, "snapshot-delete", map[string]any{"tag": "bench", "devices": []string{diskNode}}); err != nil {
		return err
	}
	return nil
}

// job runs a job of QEMU's to its end.
func (n *qemuWays) job(ctx context.Context, command string, args map[string]any) error {
	n.taken++
	id := fmt.Sprintf("bench-%d", n.taken)
	args["job-id"] = id
	if err := n.monitor.Execute(ctx, command, args, nil); err != nil {
		return err
	}
	for {
		var all []struct{ ID, Status, Error string }
		if err := n.monitor.Execute(ctx, "query-jobs", nil, &all); err != nil {
			return err
		}
		for _, j := range all {
			if j.ID != id || j.Status != "concluded" {
				continue
			}
			if err := n.monitor.Execute(ctx, "job-dismiss", map[string]any{"id": id}, nil); err != nil {
				return err
			}
			if j.Error != "" {
				return fmt.Errorf("%s: %s", command, j.Error)
			}
			return nil
		}
		if err := rest(ctx); err != nil {
			return err
		}
	}
}

// migrateStopped saves the machine while it stands still.
func (n *qemuWays) migrateStopped(ctx context.Context, path string) error {
	if err := n.Stop(ctx); err != nil {
		return err
	}
	if err := n.migrate(ctx, path); err != nil {
		return err
	}
	return n.Continue(ctx)
}

// backgroundSnapshot saves it while it runs, its writes held up until their pages are saved.
func (n *qemuWays) backgroundSnapshot(ctx context.Context, path string) error {
	set := func(on bool) error {
		return n.monitor.Execute(ctx, "migrate-set-capabilities", map[string]any{
			"capabilities": []any{map[string]any{"capability": "background-snapshot", "state": on}},
		}, nil)
	}
	if err := set(true); err != nil {
		return err
	}
	if err := n.migrate(ctx, path); err != nil {
		return err
	}
	return set(false)
}

func (n *qemuWays) migrate(ctx context.Context, path string) error {
	if err := n.monitor.Execute(ctx, "migrate", map[string]any{"uri": "file:" + path}, nil); err != nil {
		return err
	}
	for {
		state, err := qemu.Migration(ctx, n.monitor)
		if err != nil {
			return err
		}
		switch state.Status {
		case qemu.MigrationCompleted:
			return nil
		case qemu.MigrationFailed:
			return fmt.Errorf("the migration failed")
		}
		if err := rest(ctx); err != nil {
			return err
		}
	}
}

// rest waits a moment before QEMU is asked again.
func rest(ctx context.Context) error {
	select {
	case <-time.After(5 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// allocated is what a file takes of its volume; 0 where there is none.
func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
