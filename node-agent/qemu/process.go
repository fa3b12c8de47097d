package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Process is one QEMU process. Its pid and start time together name it: a pid alone is used again.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks since boot (proc(5), stat, field 22)

	Guest string   `json:"guest,omitempty"` // -name
	UUID  string   `json:"uuid,omitempty"`  // -uuid, lower case
	Args  []string `json:"-"`               // the command line, program name first

	QMPPaths []string `json:"-"` // plain QMP sockets, as the process itself would name them
	Libvirt  bool     `json:"-"` // has the monitor that libvirt makes

	proc string // where procfs is mounted
}

// String names the process for people.
func (p *Process) String() string {
	if p.Guest == "" {
		return fmt.Sprintf("pid %d", p.PID)
	}
	return fmt.Sprintf("pid %d (guest %q)", p.PID, p.Guest)
}

// Selector says which QEMU is wanted. Every field that is set must match.
type Selector struct {
	Guest string // value of -name guest=
	UUID  string // value of -uuid, in either case
	PID   int

	Proc string // where procfs is mounted; "" is /proc
}

func (s Selector) String() string {
	var parts []string
	if s.Guest != "" {
		parts = append(parts, fmt.Sprintf("guest %q", s.Guest))
	}
	if s.UUID != "" {
		parts = append(parts, "uuid "+s.UUID)
	}
	if s.PID != 0 {
		parts = append(parts, fmt.Sprintf("pid %d", s.PID))
	}
	if parts == nil {
		return "any guest"
	}
	return strings.Join(parts, ", ")
}

// NoMatchError says that no QEMU is what was looked for, and which ones there are.
type NoMatchError struct {
	Wanted  Selector
	Present []*Process
}

func (e *NoMatchError) Error() string {
	if len(e.Present) == 0 {
		return fmt.Sprintf("no running QEMU with %v; none is seen on this host", e.Wanted)
	}
	return fmt.Sprintf("no running QEMU with %v; there are: %s", e.Wanted, names(e.Present))
}

// AmbiguousError says that more than one QEMU is what was looked for.
type AmbiguousError struct {
	Wanted  Selector
	Matches []*Process
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("more than one running QEMU with %v: %s", e.Wanted, names(e.Matches))
}

func names(ps []*Process) string {
	var parts []string
	for i, p := range ps {
		if i == 10 {
			parts = append(parts, fmt.Sprintf("and %d more", len(ps)-i))
			break
		}
		parts = append(parts, p.String())
	}
	return strings.Join(parts, ", ")
}

// Find looks through the machine's processes for exactly one QEMU that matches.
func Find(ctx context.Context, want Selector) (*Process, error) {
	present, err := all(ctx, want.Proc)
	if err != nil {
		return nil, err
	}
	var matches []*Process
	for _, p := range present {
		if want.matches(p) {
			matches = append(matches, p)
		}
	}
	switch len(matches) {
	case 0:
		return nil, &NoMatchError{Wanted: want, Present: present}
	case 1:
		return matches[0], nil
	}
	return nil, &AmbiguousError{Wanted: want, Matches: matches}
}

// All finds every QEMU that this user can see, in the order of the process ids.
func All(ctx context.Context) ([]*Process, error) { return all(ctx, "") }

// all finds them where procfs is mounted; "" is /proc.
func all(ctx context.Context, proc string) ([]*Process, error) {
	if proc == "" {
		proc = "/proc"
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var present []*Process
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := readProcess(proc, pid)
		if err != nil {
			return nil, fmt.Errorf("read process %d: %w", pid, err)
		}
		if p != nil {
			present = append(present, p)
		}
	}
	slices.SortFunc(present, func(a, b *Process) int { return a.PID - b.PID })
	return present, nil
}

func (s Selector) matches(p *Process) bool {
	return (s.Guest == "" || s.Guest == p.Guest) &&
		(s.UUID == "" || strings.EqualFold(s.UUID, p.UUID)) &&
		(s.PID == 0 || s.PID == p.PID)
}

// maxCmdlineBytes bounds what is read of a command line; the kernel allows a process a few megabytes.
const maxCmdlineBytes = 4 << 20

// readProcess returns nil where pid is no QEMU, or gone.
func readProcess(proc string, pid int) (*Process, error) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	start, err := startTime(dir)
	if gone(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	cmdline, err := readBounded(filepath.Join(dir, "cmdline"), maxCmdlineBytes)
	if gone(err) || len(cmdline) == 0 { // a kernel thread or a zombie has none
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	if !isQEMU(args[0]) {
		return nil, nil
	}
	opts := parseOptions(args[1:])
	p := &Process{PID: pid, StartTime: start, Guest: guestName(opts), UUID: uuidOption(opts), Args: args, proc: proc}
	p.QMPPaths, p.Libvirt = qmpPaths(opts)
	return p, nil
}

// Alive reports whether this very process is still there, and not merely its pid. A zombie is not alive.
func (p *Process) Alive() bool {
	start, err := startTime(p.dir())
	return err == nil && start == p.StartTime
}

// dir is the process's directory in procfs.
func (p *Process) dir() string {
	proc := p.proc
	if proc == "" { // a Process read back from a record
		proc = "/proc"
	}
	return filepath.Join(proc, strconv.Itoa(p.PID))
}

var errZombie = errors.New("process has ended")

// startTime reads field 22 of stat. The second field is the program's name in parentheses and may hold anything, so the
// fields are counted from its last closing one.
func startTime(dir string) (uint64, error) {
	stat, err := readBounded(filepath.Join(dir, "stat"), 4096)
	if err != nil {
		return 0, err
	}
	_, rest, ok := bytes.Cut(stat[max(0, bytes.LastIndexByte(stat, ')')):], []byte(")"))
	fields := strings.Fields(string(rest))
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("%s/stat: too few fields", dir)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, errZombie
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s/stat: field 22: %w", dir, err)
	}
	return start, nil
}

// gone tells the errors of reading a process that ended meanwhile.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, errZombie)
}

// readBounded reads a file of procfs, whose size is not known before.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: longer than %d bytes", path, limit)
	}
	return b, nil
}
