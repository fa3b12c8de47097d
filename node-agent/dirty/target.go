package dirty

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// ErrGone: the process has ended.
var ErrGone = errors.New("process is gone")

// alive makes sure that the pid still belongs to the process meant.
func alive(p Process) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%v: %w", p, ErrGone)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", p, err)
	}
	// The second field is the program's name in parentheses, and may hold anything, parentheses too.
	_, rest, ok := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	fields := strings.Fields(rest)
	const startTime = 22 - 3 // the fields here begin with the third
	if !ok || len(fields) <= startTime {
		return fmt.Errorf("%v: its stat file has %d fields", p, len(fields))
	}
	if fields[startTime] != strconv.FormatUint(p.StartTime, 10) {
		return fmt.Errorf("%v: %w: the pid belongs to another process", p, ErrGone)
	}
	return nil
}

// currentBoot returns the kernel's name for this boot: inode numbers and start times of another one mean nothing.
func currentBoot() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

const userfaultfdLink = "anon_inode:[userfaultfd]"

// trackers finds the process's userfaultfds in asynchronous write-protect mode: ours, of whatever time. QEMU itself
// uses the synchronous modes alone.
func trackers(pid int) ([]inject.RemoteFile, error) {
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, fmt.Errorf("list descriptors of process %d: %w", pid, err)
	}
	var found []inject.RemoteFile
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			continue
		}
		file, err := inject.Identify(pid, fd)
		if err != nil || file.Link != userfaultfdLink {
			continue // closed meanwhile, or another kind of file
		}
		if asynchronous(pid, fd) {
			found = append(found, file)
		}
	}
	return found, nil
}

// asynchronous reads the features of a userfaultfd from its fdinfo: "API:\taa:FEATURES:ALL", userfaultfd_show_fdinfo
// in fs/userfaultfd.c.
func asynchronous(pid, fd int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		rest, ok := strings.CutPrefix(line, "API:")
		parts := strings.Split(strings.TrimSpace(rest), ":")
		if !ok || len(parts) < 2 {
			continue
		}
		features, err := strconv.ParseUint(parts[1], 16, 64)
		return err == nil && pagetable.Features(features)&pagetable.FeatureWPAsync != 0
	}
	return false
}
