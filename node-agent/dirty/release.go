package dirty

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// releaseStepBytes is how much is taken out of tracking in one system call. The kernel holds the process's address
// space for writing meanwhile, which stops every page fault in it: 3 ms for 64 MiB of small pages.
const releaseStepBytes = 64 << 20

// reasonReleased is why nothing is known of a process's past once tracking was taken out of it.
const reasonReleased = "tracking was taken out by a release"

// Release takes all tracking out of a process: ranges unregistered, our userfaultfds and the leash's pipe closed in
// it; the record keeps that this was done, and nothing else. It returns whether there was any tracking. The session must not be open, here
// or elsewhere ([ErrBusy]). A process that is gone is released.
func Release(ctx context.Context, p Process, recordDir string) (tracked bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("release %v: %w", p, err)
		}
	}()
	dir, lock, err := openRecordDir(recordDir, p)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	defer lock.Close()
	// First, so that whatever fails below leaves no record behind that could be believed.
	old, readErr := readRecord(dir, p)
	if err := removeRecord(dir, p); err != nil {
		return false, err
	}
	if err := alive(p); err != nil {
		if errors.Is(err, ErrGone) {
			return false, nil
		}
		return false, err
	}
	present, err := trackers(p.PID)
	if err != nil {
		return false, err
	}
	var failed []error
	if len(present) > 0 || readErr == nil {
		failed = append(failed, noteRelease(dir, p, nil))
	}
	for _, file := range present {
		failed = append(failed, takeOut(ctx, p.PID, file))
	}
	if readErr == nil && old.HeldOff != nil {
		if err := old.HeldOff.undo(ctx, p); err != nil {
			failed = append(failed, err, noteRelease(dir, p, old.HeldOff)) // the next one tries again
		}
	}
	if readErr == nil && old.Witness != nil {
		failed = append(failed, takeOutWitness(ctx, p.PID, old.Witness))
	}
	// That of a capture that was killed stays, and costs a descriptor: see [AbandonedPipe].
	if readErr == nil && old.Leash != nil && old.Leash.Idle && old.Leash.Pipe.Link != "" {
		failed = append(failed, closeRemote(ctx, p.PID, old.Leash.Pipe))
	}
	return len(present) > 0, errors.Join(failed...)
}

// noteRelease leaves a record that says why the next image cannot be made by tracking. It is not valid: nothing of it is believed.
func noteRelease(dir *os.Root, p Process, h *HeldOff) error {
	boot, err := currentBoot()
	if err != nil {
		return err
	}
	return writeRecord(dir, &Record{Version: recordVersion, Process: p, BootID: boot, Reason: reasonReleased, HeldOff: h, Updated: time.Now().UTC()})
}

// takeOut unregisters all that a userfaultfd in the process has, in steps, and closes it there.
func takeOut(ctx context.Context, pid int, file inject.RemoteFile) error {
	local, err := file.Duplicate(pid)
	if err != nil {
		return err
	}
	// Closed after the process's own: the last one to close lifts what protection is left, and that must not be
	// QEMU's main thread.
	defer local.Close()
	mappings, err := pagetable.Mappings(pid)
	if err != nil {
		return err
	}
	uffd := pagetable.Userfaultfd{File: local}
	for _, m := range mappings {
		if !m.Flags.WriteProtectRegistered() {
			continue
		}
		step := max(releaseStepBytes, m.KernelPageBytes)
		for at := m.Start; at < m.End; at += step {
			err := uffd.Unregister(at, min(step, m.End-at))
			if errors.Is(err, unix.EINVAL) {
				break // registered with another one
			}
			if err != nil {
				return err
			}
		}
	}
	return closeRemote(ctx, pid, file)
}

// closeRemote closes a file in the process; one that is closed already is no error.
func closeRemote(ctx context.Context, pid int, file inject.RemoteFile) error {
	err := inject.CloseFD(ctx, pid, file)
	if errors.Is(err, inject.ErrIdentity) || errors.Is(err, inject.ErrGone) {
		return nil
	}
	return err
}

// Sweep removes the records and locks of processes that are gone, and returns how many processes that were.
func Sweep(recordDir string) (int, error) {
	entries, err := os.ReadDir(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("sweep session records: %w", err)
	}
	dir, err := os.OpenRoot(recordDir)
	if err != nil {
		return 0, fmt.Errorf("sweep session records: %w", err)
	}
	defer dir.Close()
	gone := map[Process]bool{}
	for _, e := range entries {
		p, ok := parseRecordName(e.Name())
		if !ok || !errors.Is(alive(p), ErrGone) {
			continue
		}
		if err := dir.Remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return len(gone), fmt.Errorf("sweep session records: %w", err)
		}
		gone[p] = true
	}
	return len(gone), nil
}

// parseRecordName is the inverse of recordName and lockName, and takes a temporary record as well.
func parseRecordName(name string) (Process, bool) {
	stem, extension, _ := strings.Cut(name, ".")
	if extension != "json" && extension != "json.new" && extension != "lock" {
		return Process{}, false
	}
	first, second, _ := strings.Cut(stem, "-")
	pid, err1 := strconv.Atoi(first)
	start, err2 := strconv.ParseUint(second, 10, 64)
	return Process{PID: pid, StartTime: start}, err1 == nil && err2 == nil && pid > 0
}
