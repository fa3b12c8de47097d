package restore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/durable"
)

// Mark is the note on the node that a machine's memory is invalid: one file for each QEMU process, in the directory of the session records, from
// before the first byte is written until all memory was seen to be right.
type Mark struct {
	Version int           `json:"version"`
	Process dirty.Process `json:"process"`
	BootID  string        `json:"bootID"` // /proc/sys/kernel/random/boot_id
	Image   dirty.Image   `json:"image"`
	Since   time.Time     `json:"since"`
	Phase   string        `json:"phase"` // that had begun
}

const (
	markVersion  = 1
	noteMaxBytes = 64 << 10
	markSuffix   = ".memory-invalid"
)

func markName(p dirty.Process) string { return noteName(p, markSuffix) }

// noteName is the name of a file about a process.
func noteName(p dirty.Process, suffix string) string {
	return fmt.Sprintf("%d-%d%s", p.PID, p.StartTime, suffix)
}

// Invalid returns an [*InvalidMemoryError] where a restore has left the memory of a process half written: such a machine must be neither
// captured nor continued. A mark that cannot be read is an error too: nobody knows that the memory is sound.
func Invalid(recordDir string, p dirty.Process) error {
	dir, err := os.OpenRoot(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look whether the memory of %v is valid: %w", p, err)
	}
	defer dir.Close()
	mark, err := readMark(dir, p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look whether the memory of %v is valid: %w", p, err)
	}
	boot, err := bootID()
	if err != nil {
		return fmt.Errorf("look whether the memory of %v is valid: %w", p, err)
	}
	if mark.BootID != boot {
		return nil // of a process that had the same pid and start time before the machine was booted
	}
	return &InvalidMemoryError{Mark: *mark}
}

func readMark(dir *os.Root, p dirty.Process) (*Mark, error) {
	m := new(Mark)
	if err := readNote(dir, markName(p), m); err != nil {
		return nil, err
	}
	if m.Version != markVersion || m.Process != p {
		return nil, fmt.Errorf("%s: has version %d and is of %v", markName(p), m.Version, m.Process)
	}
	return m, nil
}

// readNote reads a small JSON file.
func readNote(dir *os.Root, name string, note any) error {
	f, err := dir.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, noteMaxBytes))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, note); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// write puts the mark in place, whole or not at all, and returns when it is on the disk.
func (m *Mark) write(dir *os.Root) error {
	if err := durable.WriteJSON(dir, markName(m.Process), m); err != nil {
		return fmt.Errorf("mark the memory of %v invalid: %w", m.Process, err)
	}
	return nil
}

// enter notes that another phase begins.
func (m *Mark) enter(dir *os.Root, phase string) error {
	m.Phase = phase
	return m.write(dir)
}

// remove takes the mark away.
func (m *Mark) remove(dir *os.Root) error {
	if err := durable.Remove(dir, markName(m.Process)); err != nil {
		return fmt.Errorf("take the mark of invalid memory from %v: %w", m.Process, err)
	}
	return nil
}

// Sweep removes the marks and notes of processes that are gone, and returns how many files that were.
func Sweep(recordDir string) (int, error) {
	entries, err := os.ReadDir(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("sweep marks and notes of restores: %w", err)
	}
	dir, err := os.OpenRoot(recordDir)
	if err != nil {
		return 0, fmt.Errorf("sweep marks and notes of restores: %w", err)
	}
	defer dir.Close()
	removed := 0
	for _, e := range entries {
		p, ok := parseNoteName(e.Name())
		if !ok || started(p) {
			continue
		}
		if err := dir.Remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("sweep marks and notes of restores: %w", err)
		}
		removed++
	}
	return removed, nil
}

// parseNoteName is the inverse of noteName, and takes a temporary file as well.
func parseNoteName(name string) (dirty.Process, bool) {
	name = strings.TrimSuffix(name, ".new")
	stem, ok := strings.CutSuffix(name, markSuffix)
	if !ok {
		stem, ok = strings.CutSuffix(name, stopSuffix)
	}
	first, second, _ := strings.Cut(stem, "-")
	pid, err1 := strconv.Atoi(first)
	start, err2 := strconv.ParseUint(second, 10, 64)
	return dirty.Process{PID: pid, StartTime: start}, ok && err1 == nil && err2 == nil && pid > 0
}

// started tells whether a process may still be there. It looks at the pid alone: what is in doubt stays.
func started(p dirty.Process) bool {
	_, err := os.Stat("/proc/" + strconv.Itoa(p.PID))
	return !errors.Is(err, fs.ErrNotExist)
}

// bootID is the kernel's name for this boot.
func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}
