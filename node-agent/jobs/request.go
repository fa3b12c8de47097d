package jobs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

// VM says which machine is meant and how to reach its monitor.
type VM struct {
	Guest string `json:"guest,omitempty"`
	UUID  string `json:"uuid,omitempty"`
	PID   int    `json:"pid,omitempty"`

	// How to reach the monitor, where that is not to be found out from the process: paths of sockets on this machine.
	QMPSocket     string `json:"qmpSocket,omitempty"`
	LibvirtSocket string `json:"libvirtSocket,omitempty"`
}

// Find finds the process.
func (v VM) Find(ctx context.Context) (*qemu.Process, error) {
	return qemu.Find(ctx, qemu.Selector{Guest: v.Guest, UUID: v.UUID, PID: v.PID})
}

// MonitorError says that the machine is there and its monitor cannot be reached.
type MonitorError struct {
	Process *qemu.Process
	Err     error
}

func (e *MonitorError) Error() string {
	return fmt.Sprintf("reach the monitor of %v: %v", e.Process, e.Err)
}

func (e *MonitorError) Unwrap() error { return e.Err }

// busyEvery is how often it is looked whether somebody else is at work on a machine whose monitor does not answer.
const busyEvery = 100 * time.Millisecond

// open finds the process and connects to its monitor. A plain socket serves one client at a time, and another's greeting never comes: where
// somebody has the machine's session, by what is noted in the record directory, the error is a [dirty.ErrBusy] at once.
func (v VM) open(ctx context.Context, recordDir string) (*qemu.Process, qemu.Monitor, error) {
	p, err := v.Find(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := dirty.Busy(recordDir, sessionOf(p)); errors.Is(err, dirty.ErrBusy) {
		return nil, nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	dialing, end := context.WithCancelCause(bounded)
	defer end(nil)
	// Who has the socket may take the session only later.
	go func() {
		tick := time.NewTicker(busyEvery)
		defer tick.Stop()
		for {
			select {
			case <-dialing.Done():
				return
			case <-tick.C:
			}
			if err := dirty.Busy(recordDir, sessionOf(p)); errors.Is(err, dirty.ErrBusy) {
				end(err)
			}
		}
	}()
	options := qemu.DialOptions{QMPSocket: v.QMPSocket, LibvirtSocket: v.LibvirtSocket}
	if files := supervise.Files(ctx); len(files) != 0 {
		options.Socket = files[0]
	}
	m, err := qemu.DialProcess(dialing, p, options)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, nil, cause
		}
		if busy := context.Cause(dialing); errors.Is(busy, dirty.ErrBusy) {
			return nil, nil, busy
		}
		return nil, nil, &MonitorError{Process: p, Err: err}
	}
	return p, m, nil
}

// Repository says where images are kept and which file has the keys to them.
type Repository struct {
	Dir     string `json:"dir"`
	KeyFile string `json:"keyFile"`

	// Volume, where set, is the root of a volume that somebody else owns, and Dir a directory on it, named from there.
	Volume string `json:"volume,omitempty"`
	// ID, where set, is that of the repository which it has to be: a volume that is not mounted shows what lies beneath it.
	ID string `json:"id,omitempty"`
}

// KeyError says that the keys could not be had: nothing is known of the repository then.
type KeyError struct{ Err error }

func (e *KeyError) Error() string { return e.Err.Error() }
func (e *KeyError) Unwrap() error { return e.Err }

// NoRepositoryError says that a directory has no repository in it, or is not there. It is an [image.ErrNotFound].
type NoRepositoryError struct {
	Dir    string
	Volume string // on which it was looked for; "" for none
}

func (e *NoRepositoryError) Error() string {
	if e.Volume != "" {
		return fmt.Sprintf("there is no repository on the volume at %s: is it mounted?", e.Volume)
	}
	return fmt.Sprintf("there is no repository in %s", e.Dir)
}

func (e *NoRepositoryError) Unwrap() error { return image.ErrNotFound }

// OtherRepositoryError says that a repository is not the one that was meant.
type OtherRepositoryError struct{ Path, Want, Found string }

func (e *OtherRepositoryError) Error() string {
	return fmt.Sprintf("the repository in %s is another (%s) than the one with the claim's images (%s): is the volume mounted?", e.Path, e.Found, e.Want)
}

// Open opens the repository.
func (r Repository) Open() (*image.Repository, error) {
	keys, err := r.Keys()
	if err != nil {
		return nil, err
	}
	var repository *image.Repository
	if r.Volume != "" {
		repository, err = image.OpenRepositoryOn(r.Volume, r.Dir, keys)
	} else {
		repository, err = image.OpenRepository(r.Dir, keys)
	}
	if errors.Is(err, image.ErrNotFound) {
		return nil, &NoRepositoryError{r.Dir, r.Volume}
	}
	if err != nil {
		return nil, err
	}
	if found := repository.ID().String(); r.ID != "" && found != r.ID {
		repository.Close()
		return nil, &OtherRepositoryError{Path: filepath.Join(r.Volume, r.Dir), Want: r.ID, Found: found}
	}
	return repository, nil
}

// recordDir returns where session records are kept, the default filled in.
func recordDir(dir string) string {
	if dir == "" {
		return dirty.DefaultRecordDir
	}
	return dir
}

// sessionOf names the process as session records do.
func sessionOf(p *qemu.Process) dirty.Process {
	return dirty.Process{PID: p.PID, StartTime: p.StartTime}
}
