package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/test/machine"
)

// increments measures increments with 10 MB changed: their size and time against the base's, on a guest of 1 GiB, and the pause, on
// guests of 1 and 4 GiB, busy and idle.
func increments(ctx context.Context, b *bench) ([]table, error) {
	code, err := programCode(ctx)
	if err != nil {
		return nil, err
	}
	sizes := table{
		Title: "An increment: 10 MB changed of 1 GiB",
		Text: "The guest's memory is full of program code (the Go toolchain's own binaries, without their uniform pages). Between two checkpoints the guest's processor " +
			"changes 2,441 pages at random all over it, to random content, and then spins: it takes one of the cores. zstd.",
	}
	var (
		base   = sizes.figure("base, time", seconds, nil)
		taken  = sizes.figure("increment, time", milliseconds, nil)
		wall   = sizes.figure("increment, time with the start of the worker process", milliseconds, nil)
		raw    = sizes.figure("increment, pages before compression", megabytes, atMost(11))
		stored = sizes.figure("increment, all files of its own", megabytes, nil)
		share  = sizes.figure("increment's time by the base's", percent, atMost(10))
	)
	pauses := pauseTable()
	write := machine.Writer{}
	err = b.with(ctx, machine.Options{Guest: write, MemoryBytes: machine.GiB}, "", func(r *rig) error {
		if err := r.SetWriterParameters(ctx, r.quiet()); err != nil {
			return err
		}
		if err := r.fill(code); err != nil {
			return err
		}
		for range b.runs {
			if err := r.clear(ctx); err != nil {
				return err
			}
			t, err := r.capture(ctx, capture.Full, image.Zstd)
			if err != nil {
				return err
			}
			base.add(t.Duration.Seconds())
		}
		row := pauses.line("1 GiB, busy")
		for range 3 * b.runs {
			if err := r.change(ctx); err != nil {
				return err
			}
			t, err := r.increment(ctx)
			if err != nil {
				return err
			}
			taken.add(inMilliseconds(t.Duration))
			wall.add(inMilliseconds(t.wall))
			raw.add(float64(t.Pages.WrittenRaw) / 1e6)
			own, err := r.ownBytes()
			if err != nil {
				return err
			}
			stored.add(float64(own) / 1e6)
			share.add(100 * t.Duration.Seconds() / base.median())
			row.add(t)
		}
		return nil
	})
	if err != nil {
		return []table{sizes, pauses.table}, err
	}
	for _, c := range []struct {
		name  string
		guest machine.Guest
		bytes uint64
		goal  *goal
	}{
		{"1 GiB, idle", machine.Idle{}, machine.GiB, nil},
		{"4 GiB, idle", machine.Idle{}, 4 * machine.GiB, atMost(15)},
		{"4 GiB, busy", write, 4 * machine.GiB, atMost(15)},
	} {
		err := b.with(ctx, machine.Options{Guest: c.guest, MemoryBytes: c.bytes}, "", func(r *rig) error {
			change := func() error { return r.poke(code) }
			if _, busy := c.guest.(machine.Writer); busy {
				if err := r.SetWriterParameters(ctx, r.quiet()); err != nil {
					return err
				}
				change = func() error { return r.change(ctx) }
			}
			// Every page in its place, and little to be compressed: the base is not what is measured here.
			if err := r.fill(uniform()); err != nil {
				return err
			}
			if _, err := r.capture(ctx, capture.Full, image.S2); err != nil {
				return err
			}
			row := pauses.line(c.name)
			row.total.Goal = c.goal
			for range 3 * b.runs {
				if err := change(); err != nil {
					return err
				}
				t, err := r.increment(ctx)
				if err != nil {
					return err
				}
				row.add(t)
			}
			return nil
		})
		if err != nil {
			return []table{sizes, pauses.table}, fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return []table{sizes, pauses.goals(), pauses.table}, nil
}

// increment takes one, and makes sure that it came by tracking, its pause by QEMU's own stamps.
func (r *rig) increment(ctx context.Context) (taken, error) {
	t, err := r.capture(ctx, capture.Incremental, image.Zstd)
	if err != nil {
		return t, err
	}
	if t.Source != "page tables" || t.Harvest.Rounds != 0 || !t.Pauses[len(t.Pauses)-1].Exact {
		return t, fmt.Errorf("not the increment that was to be measured: %+v", *t.Result)
	}
	return t, nil
}

// ownBytes is what the newest image added to the volume: all of it that is no other image's too.
func (r *rig) ownBytes() (bytes int64, err error) {
	dir := filepath.Join(r.repository.Dir, "images", r.newest())
	files, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, f.Name()), &st); err != nil {
			return 0, fmt.Errorf("look at %s of image %s: %w", f.Name(), r.newest(), err)
		}
		if st.Nlink == 1 {
			bytes += st.Blocks * 512
		}
	}
	return bytes, nil
}

// with runs do on a machine that ends with it.
func (b *bench) with(ctx context.Context, o machine.Options, dir string, do func(*rig) error) error {
	r, err := b.newRig(ctx, o, dir)
	if err != nil {
		return err
	}
	err = do(r)
	if closing := r.close(); err == nil {
		err = closing
	}
	return err
}

// pauseParts are the parts of a pause as the report of a checkpoint names them, in order.
var pauseParts = []string{"stop", "serialise", "scan", "copy", "re-arm", "let go"}

// pauses is a table of pauses with their parts.
type pauses struct{ table }

func pauseTable() *pauses {
	return &pauses{table{
		Title: "The parts of a pause",
		Text: "Of increments with 10 MB changed, over a plain QMP socket. The pause is from QEMU's STOP to its RESUME by its own stamps; the parts are as the worker sees them. " +
			"Stop: until the first byte of the device state is seen; serialise: until all but its end is read; let go: until QEMU has answered. " +
			"Guests of 1 GiB that are busy are those above; of the others all memory holds something, the idle ones halt, and the pages are changed from outside, evenly over all memory.",
		Columns: append([]string{"guest", "pause"}, pauseParts...),
	}}
}

// pauseRow is one line of it.
type pauseRow struct {
	total *cell
	parts map[string]*cell
}

func (p *pauses) line(name string) pauseRow {
	units := make([]unit, 1+len(pauseParts))
	for i := range units {
		units[i] = milliseconds
	}
	cells := p.row(name, units...)
	row := pauseRow{cells[0], map[string]*cell{}}
	for i, part := range pauseParts {
		row.parts[part] = cells[1+i]
	}
	return row
}

// add adds a checkpoint: what it made the guest stand still in all, and the parts of the pause that held. On a machine too busy to keep
// the bound of a hold there were others before it.
func (r pauseRow) add(t taken) {
	r.total.add(inMilliseconds(t.Downtime))
	for _, part := range t.Pauses[len(t.Pauses)-1].Parts {
		if c := r.parts[part.Name]; c != nil {
			c.add(inMilliseconds(part.Duration))
		}
	}
}

// goals is the list of the pauses that have one.
func (p *pauses) goals() table {
	t := table{Title: "The pause"}
	for _, l := range p.Lines {
		if l.Cells[0].Goal != nil {
			t.Lines = append(t.Lines, line{"increment with 10 MB changed, guest of " + l.What, l.Cells[:1]})
		}
	}
	return t
}

func inMilliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
