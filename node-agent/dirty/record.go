package dirty

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/durable"
	"github.com/vmckpt/vmckpt/node-agent/inject"
)

// Record is what the node keeps of a capture session between captures, one file for each QEMU process. It is the only
// link between the tracking in the process and an image: while Valid is set, every page that may differ from Image
// shows as written in the process.
type Record struct {
	Version      int       `json:"version"`
	Process      Process   `json:"process"`
	BootID       string    `json:"bootID"`       // /proc/sys/kernel/random/boot_id
	LayoutDigest string    `json:"layoutDigest"` // [LayoutDigest]
	Valid        bool      `json:"valid"`
	Reason       string    `json:"reason,omitempty"` // why it is not valid
	Image        Image     `json:"image,omitzero"`
	Updated      time.Time `json:"updated"`

	Userfaultfd inject.RemoteFile `json:"userfaultfd,omitzero"`
	Tracked     []string          `json:"tracked,omitempty"` // names of the blocks that are registered with it
	Leash       *Leash            `json:"leash,omitempty"`
	Abandoned   []AbandonedPipe   `json:"abandoned,omitempty"`
	HeldOff     *HeldOff          `json:"heldOff,omitempty"`

	Witness *Witness `json:"witness,omitempty"`
	Nested  bool     `json:"nested,omitempty"` // the guest ran guests of its own at the image
}

// Image names the image that tracking counts from.
type Image struct {
	Name   string `json:"name"`
	Digest string `json:"digest"` // of its manifest, lower-case hexadecimal
}

// Leash is what a capture learned of the process for the next one's leash. Nothing here depends on it.
type Leash struct {
	Pipe        inject.RemoteFile `json:"pipe"`
	Idle        bool              `json:"idle,omitempty"` // no command that would write into the pipe can be on its way to QEMU
	StreamBytes int64             `json:"streamBytes"`    // length of the device state
	Sections    json.RawMessage   `json:"sections,omitempty"`
}

// AbandonedPipe is the leash's pipe of a capture that was killed. Its command may still be on its way to QEMU, which opens the pipe by its
// number: that must not become another file's, a disk's perhaps, which the command would overwrite. So the pipe stays open for a while, with
// no reader: who writes to it gets EPIPE.
type AbandonedPipe struct {
	Pipe  inject.RemoteFile `json:"pipe"`
	Since time.Duration     `json:"sinceBootNanoseconds"` // CLOCK_BOOTTIME
}

// abandonedFor is how long such a pipe is kept. libvirt lets a command wait for half a minute (QEMU_JOB_WAIT_TIME in its qemu_domainjob.h),
// and one that QEMU has is over when QEMU answers another.
const abandonedFor = 2 * time.Minute

const (
	recordVersion = 1
	// recordMaxBytes bounds what is read of a record: one is some 2 KiB, with the sections of a large machine 32.
	recordMaxBytes = 1 << 20
)

// recordName is the record's file name for a process.
func recordName(p Process) string { return fmt.Sprintf("%d-%d.json", p.PID, p.StartTime) }

func lockName(p Process) string { return fmt.Sprintf("%d-%d.lock", p.PID, p.StartTime) }

// readRecord reads the record of a process. Fields that it does not know are passed over, as a newer agent may have
// written them; everything else that is not as it should be is an error, and fs.ErrNotExist means that there is none.
func readRecord(dir *os.Root, p Process) (*Record, error) {
	f, err := dir.OpenFile(recordName(p), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("session record: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, recordMaxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("session record: %w", err)
	}
	if len(text) > recordMaxBytes {
		return nil, fmt.Errorf("session record is larger than %d bytes", recordMaxBytes)
	}
	r := &Record{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("session record: %w", err)
	}
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("session record has version %d", r.Version)
	case r.Process != p:
		return nil, fmt.Errorf("session record is of another process, %v", r.Process)
	}
	return r, nil
}

// Look returns the image that tracking of a process counts from, or an [*UnknownError] that says why there is none. It is a look, as [Busy] is:
// the next capture decides anew.
func Look(recordDir string, p Process) (_ Image, err error) {
	defer func() {
		if unknown := (*UnknownError)(nil); err != nil && !errors.As(err, &unknown) {
			err = fmt.Errorf("look at the tracking of %v: %w", p, err)
		}
	}()
	dir, err := os.OpenRoot(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, &UnknownError{Reason: noRecord}
	}
	if err != nil {
		return Image{}, err
	}
	defer dir.Close()
	r, err := readRecord(dir, p)
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, &UnknownError{Reason: noRecord}
	}
	if err != nil {
		return Image{}, err
	}
	boot, err := currentBoot()
	if err != nil {
		return Image{}, err
	}
	switch {
	case r.BootID != boot:
		return Image{}, &UnknownError{Reason: noRecord} // of a process before the boot
	case !r.Valid:
		return Image{}, &UnknownError{Reason: r.Reason}
	}
	present, err := trackers(p.PID)
	if err != nil {
		return Image{}, err
	}
	if !slices.Contains(present, r.Userfaultfd) {
		return Image{}, &UnknownError{Reason: noUserfaultfd}
	}
	return r.Image, nil
}

// writeRecord puts the record in place whole or not at all, and returns when it is on the disk: what a caller does after
// writing it invalid must not be seen beside a valid one.
func writeRecord(dir *os.Root, r *Record) error {
	if err := durable.WriteJSON(dir, recordName(r.Process), r); err != nil {
		return fmt.Errorf("write session record: %w", err)
	}
	return nil
}

// removeRecord takes the record away.
func removeRecord(dir *os.Root, p Process) error {
	if err := durable.Remove(dir, recordName(p)); err != nil {
		return fmt.Errorf("remove session record: %w", err)
	}
	return nil
}
