package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/durable"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// Stop is the note on the node that a restore stopped a machine which ran, and has written nothing to it yet: one file for each QEMU process,
// from before the `stop` until the machine is marked ([Mark]), or goes on. Where a restore is killed in between, it says whose doing it is that the
// machine stands still.
type Stop struct {
	Version int           `json:"version"`
	Process dirty.Process `json:"process"`
	BootID  string        `json:"bootID"` // /proc/sys/kernel/random/boot_id
	Since   time.Time     `json:"since"`
}

const (
	stopVersion = 1
	stopSuffix  = ".stopped"
)

func stopName(p dirty.Process) string { return noteName(p, stopSuffix) }

// write puts the note in place and returns when it is on the disk.
func (s *Stop) write(dir *os.Root) error {
	if err := durable.WriteJSON(dir, stopName(s.Process), s); err != nil {
		return fmt.Errorf("note that %v is about to be stopped: %w", s.Process, err)
	}
	return nil
}

// removeStop takes the note away, if there is one.
func removeStop(dir *os.Root, p dirty.Process) error {
	if err := durable.Remove(dir, stopName(p)); err != nil {
		return fmt.Errorf("take away the note that %v was stopped: %w", p, err)
	}
	return nil
}

// LeftStopped returns the note of a restore that stopped a process's machine and was killed before it wrote anything or let the machine go
// on. It is nil where there is none, and where the memory is marked invalid: then it is the mark that counts. The machine may run by now,
// resumed by somebody else.
func LeftStopped(recordDir string, p dirty.Process) (*Stop, error) {
	stop, err := func() (*Stop, error) {
		if err := Invalid(recordDir, p); err != nil {
			return nil, nil //nolint:nilerr // whoever asks for the mark gets that
		}
		dir, err := os.OpenRoot(recordDir)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		s := new(Stop)
		if err := readNote(dir, stopName(p), s); err != nil {
			return nil, err
		}
		if s.Version != stopVersion || s.Process != p {
			return nil, fmt.Errorf("%s: has version %d and is of %v", stopName(p), s.Version, s.Process)
		}
		boot, err := bootID()
		if err != nil || s.BootID != boot {
			return nil, err
		}
		return s, nil
	}()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look whether a restore left %v stopped: %w", p, err)
	}
	return stop, nil
}

// Stops returns the notes in a record directory, as [LeftStopped] does, of processes that may still be there.
func Stops(recordDir string) ([]*Stop, error) {
	entries, err := os.ReadDir(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for machines that a restore left stopped: %w", err)
	}
	var stops []*Stop
	for _, e := range entries {
		p, ok := parseNoteName(e.Name())
		if !ok || !strings.HasSuffix(e.Name(), stopSuffix) || !started(p) {
			continue
		}
		stop, err := LeftStopped(recordDir, p)
		if err != nil {
			return stops, err
		}
		if stop != nil {
			stops = append(stops, stop)
		}
	}
	return stops, nil
}

// Admit says whether work on a machine may begin: not where a restore has left its memory half written ([Invalid]). Called with the machine's
// session in hand, it forgets the note of a restore that was killed, where the machine is seen to run again.
func Admit(ctx context.Context, target Target, recordDir string) error {
	p := target.session()
	if err := Invalid(recordDir, p); err != nil {
		return err
	}
	stop, err := LeftStopped(recordDir, p)
	if err != nil || stop == nil {
		return err
	}
	if state, err := qemu.Status(ctx, target.Monitor); err != nil || state != qemu.StateRunning {
		return err
	}
	return forgetStop(recordDir, p)
}

// Continue lets a machine go on that a restore has stopped, and was killed before it wrote anything to it. It does nothing where there is no
// note of that, and where somebody else works on the machine an error is [dirty.ErrBusy]. It is for whoever sees the restore die: a note
// that is found later does not tell whether the machine ran since, and was paused by its owner.
func Continue(ctx context.Context, target Target, recordDir string) error {
	p := target.session()
	lock, err := dirty.Lock(recordDir, p)
	if err != nil {
		return err
	}
	defer lock.Close()
	stop, err := LeftStopped(recordDir, p)
	if err != nil || stop == nil {
		return err
	}
	if err := wake(ctx, target.Monitor); err != nil {
		return fmt.Errorf("continue %v, which a restore stopped: %w", target.Process, err)
	}
	return forgetStop(recordDir, p)
}

func forgetStop(recordDir string, p dirty.Process) error {
	dir, err := os.OpenRoot(recordDir)
	if err != nil {
		return fmt.Errorf("record directory: %w", err)
	}
	defer dir.Close()
	return removeStop(dir, p)
}

// wake continues a machine that our own stop took out of running. One that runs already was continued by somebody who was faster.
func wake(ctx context.Context, m qemu.Monitor) error {
	migration, err := qemu.Migration(ctx, m)
	if err != nil {
		return err
	}
	state, err := qemu.Status(ctx, m)
	if err != nil || state == qemu.StateRunning {
		return err
	}
	ok, why := qemu.MayContinue(qemu.Standstill{Before: qemu.StateRunning, Now: state, Migration: migration.Status})
	if !ok {
		return errors.New(why)
	}
	return m.Execute(ctx, "cont", nil, nil)
}
