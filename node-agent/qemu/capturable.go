package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// Code names a kind of reason for which a VM is refused. Codes are for programs and stay the same; texts are for people.
type Code string

const (
	CodeVFIO            Code = "vfio"
	CodeVDPA            Code = "vdpa"
	CodeVhostUser       Code = "vhost-user"
	CodeMemoryDevice    Code = "memory-device"
	CodeConfidential    Code = "confidential-guest"
	CodeIvshmem         Code = "ivshmem"
	CodeForeignMemory   Code = "foreign-memory" // device emulation in another process
	CodeHugePages       Code = "1gib-pages"
	CodeSharedWriter    Code = "shared-writer"
	CodeMigrationBlock  Code = "migration-blocked" // among others, a device whose state QEMU cannot save
	CodeMigrationActive Code = "migration-active"
	CodeRunState        Code = "run-state"
)

// Reason is one thing that stands against capturing a VM.
type Reason struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
}

// RefusedError says that a VM cannot be captured or restored truly, and all the reasons why.
type RefusedError struct {
	Process string
	Reasons []Reason
}

func (e *RefusedError) Error() string {
	texts := make([]string, len(e.Reasons))
	for i, r := range e.Reasons {
		texts[i] = r.Text
	}
	return fmt.Sprintf("qemu %s is refused: %s", e.Process, strings.Join(texts, "; "))
}

// refusal is a kind of thing that QEMU has, by the name of its type (path.Match patterns), and why it is refused.
type refusal struct {
	patterns []string
	code     Code
	why      string
}

// refusedDevices are by QOM type. Devices whose state QEMU cannot save are not among them: QEMU counts those as migration
// blockers.
var refusedDevices = []refusal{
	{[]string{"vfio-*"}, CodeVFIO, "hardware writes the guest's memory and holds state of its own"},
	{[]string{"pvrdma"}, CodeVFIO, "hardware writes the guest's memory"},
	{[]string{"vhost-vdpa*"}, CodeVDPA, "hardware writes the guest's memory"},
	{[]string{"vhost-user-*"}, CodeVhostUser, "another process writes the guest's memory and holds state of its own"},
	{[]string{"virtio-mem*", "pc-dimm", "nvdimm", "virtio-pmem*", "sgx-epc", "hv-balloon"}, CodeMemoryDevice,
		"memory devices are not supported"},
	{[]string{"ivshmem*"}, CodeIvshmem, "its memory is shared with others"},
	{[]string{"x-pci-proxy-dev", "x-vfio-user-server"}, CodeForeignMemory, "another process emulates the device"},
}

// refusedBlockDrivers are drivers of block nodes.
var refusedBlockDrivers = []refusal{
	{[]string{"nvme", "nvme-io_uring", "virtio-blk-vfio-*"}, CodeVFIO, "hardware writes the guest's memory"},
	{[]string{"virtio-blk-vhost-vdpa"}, CodeVDPA, "hardware writes the guest's memory"},
	{[]string{"virtio-blk-vhost-user"}, CodeVhostUser, "another process writes the guest's memory"},
}

// refusedNetdevs are types of network back ends.
var refusedNetdevs = []refusal{
	{[]string{"vhost-vdpa"}, CodeVDPA, "hardware writes the guest's memory"},
	{[]string{"vhost-user"}, CodeVhostUser, "another process writes the guest's memory"},
}

// against returns the reason against something of that type.
func against(refused []refusal, what, typename string) []Reason {
	for _, r := range refused {
		for _, p := range r.patterns {
			if ok, _ := path.Match(p, typename); ok {
				return []Reason{{r.code, fmt.Sprintf("%s %s: %s", what, typename, r.why)}}
			}
		}
	}
	return nil
}

// Capturable refuses a VM that cannot be captured truly now, with a *RefusedError that has all the reasons. Nothing is
// changed.
func Capturable(ctx context.Context, m Monitor, p *Process, layout Layout) error {
	reasons, err := supported(ctx, m, p, layout)
	if err != nil {
		return err
	}
	state, err := Status(ctx, m)
	if err != nil {
		return err
	}
	if state != StateRunning && state != StatePaused {
		reasons = append(reasons, Reason{CodeRunState, fmt.Sprintf("the VM is %s, neither running nor paused", state)})
	}
	return refuse(p, reasons)
}

// Supported is Capturable without a look at the run state: for a VM that something is to be loaded into.
func Supported(ctx context.Context, m Monitor, p *Process, layout Layout) error {
	reasons, err := supported(ctx, m, p, layout)
	if err != nil {
		return err
	}
	return refuse(p, reasons)
}

func refuse(p *Process, reasons []Reason) error {
	if len(reasons) == 0 {
		return nil
	}
	// The same device twice is one reason.
	slices.SortStableFunc(reasons, func(a, b Reason) int { return strings.Compare(a.Text, b.Text) })
	return &RefusedError{p.String(), slices.Compact(reasons)}
}

func supported(ctx context.Context, m Monitor, p *Process, layout Layout) ([]Reason, error) {
	var reasons []Reason
	for _, look := range []func() ([]Reason, error){
		func() ([]Reason, error) { return againstMigration(ctx, m) },
		func() ([]Reason, error) { return againstDevices(ctx, m) },
		func() ([]Reason, error) { return againstBackends(ctx, m) },
		func() ([]Reason, error) { return againstConfidential(ctx, m) },
		func() ([]Reason, error) { return againstMemory(p, layout) },
	} {
		found, err := look()
		if err != nil {
			return nil, fmt.Errorf("look for what stands against qemu %v: %w", p, err)
		}
		reasons = append(reasons, found...)
	}
	return reasons, nil
}

func againstMigration(ctx context.Context, m Monitor) ([]Reason, error) {
	state, err := Migration(ctx, m)
	if err != nil {
		return nil, err
	}
	var reasons []Reason
	if !state.Status.Idle() {
		reasons = append(reasons, Reason{CodeMigrationActive, fmt.Sprintf("a migration is %s", state.Status)})
	}
	for _, why := range state.Blocked {
		reasons = append(reasons, Reason{CodeMigrationBlock, "QEMU says: " + why})
	}
	return reasons, nil
}

// againstDevices looks at the devices on buses, at those that were plugged without one, and at memory devices.
func againstDevices(ctx context.Context, m Monitor) ([]Reason, error) {
	text, err := Human(ctx, m, "info qtree")
	if err != nil {
		return nil, err
	}
	devices, err := parseQTree(text)
	if err != nil {
		return nil, err
	}
	var reasons []Reason
	within := "" // the device refused last; what is inside it goes with it
	for _, d := range devices {
		if within != "" && strings.HasPrefix(d.Path, within+"/") {
			continue
		}
		if r := against(refusedDevices, "device", d.Type); r != nil {
			within = d.Path
			reasons = append(reasons, r...)
		}
	}
	for _, container := range []string{"/machine/peripheral", "/machine/peripheral-anon", "/objects"} { // a vfio-user server is an object
		var children []struct {
			Type string `json:"type"`
		}
		if err := m.Execute(ctx, "qom-list", map[string]string{"path": container}, &children); err != nil {
			return nil, err
		}
		for _, c := range children {
			if t, ok := strings.CutPrefix(c.Type, "child<"); ok {
				reasons = append(reasons, against(refusedDevices, "device", strings.TrimSuffix(t, ">"))...)
			}
		}
	}
	var memory []struct {
		Type string `json:"type"`
	}
	if err := m.Execute(ctx, "query-memory-devices", nil, &memory); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(reasons, func(r Reason) bool { return r.Code == CodeMemoryDevice }) {
		return reasons, nil
	}
	for _, d := range memory {
		reasons = append(reasons, Reason{CodeMemoryDevice, fmt.Sprintf("memory device %s: memory devices are not supported", d.Type)})
	}
	return reasons, nil
}

var netdevType = regexp.MustCompile(`(?m)^[^\n]*?: index=\d+,type=([a-z0-9-]+)`)

// againstBackends looks at what is behind disks and network devices.
func againstBackends(ctx context.Context, m Monitor) ([]Reason, error) {
	var nodes []struct {
		Driver string `json:"drv"`
	}
	if err := m.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	var reasons []Reason
	for _, n := range nodes {
		reasons = append(reasons, against(refusedBlockDrivers, "block driver", n.Driver)...)
	}
	text, err := Human(ctx, m, "info network")
	if err != nil {
		return nil, err
	}
	for _, f := range netdevType.FindAllStringSubmatch(text, -1) {
		reasons = append(reasons, against(refusedNetdevs, "network back end", f[1])...)
	}
	return reasons, nil
}

// againstConfidential refuses SEV, TDX and their like, whose memory cannot be read from outside.
func againstConfidential(ctx context.Context, m Monitor) ([]Reason, error) {
	var object string
	args := map[string]string{"path": "/machine", "property": "confidential-guest-support"}
	err := m.Execute(ctx, "qom-get", args, &object)
	switch {
	case isGenericError(err): // before QEMU 6.0 there was no such property
		return nil, nil
	case err != nil:
		return nil, err
	case object == "":
		return nil, nil
	}
	return []Reason{{CodeConfidential, fmt.Sprintf("a confidential guest (%s): its memory cannot be read", object)}}, nil
}

// isGenericError tells a refusal without a class of its own, as a property that is not there gives.
func isGenericError(err error) bool {
	e := asQMPError(err)
	return e != nil && e.Class == "GenericError"
}

// againstMemory looks at the pages under the RAM blocks, and for other processes that can write them.
func againstMemory(p *Process, layout Layout) ([]Reason, error) {
	var reasons []Reason
	files := make(map[string]string) // device and inode of shared memory → block
	for _, b := range layout {
		if b.HostPageBytes >= 1<<30 {
			reasons = append(reasons, Reason{CodeHugePages, fmt.Sprintf("RAM block %q lies on pages of 1 GiB", b.Name)})
		}
		if b.Shared {
			files[b.Backing.Dev+" "+strconv.FormatUint(b.Backing.Inode, 10)] = b.Name
		}
	}
	if len(files) == 0 {
		return reasons, nil
	}
	writers, err := sharedWriters(p, files)
	return append(reasons, writers...), err
}

// sharedWriters finds the processes that have a file of guest memory mapped for writing. It does what it can: a process
// that only holds the file open, or maps it a moment later, is not found.
func sharedWriters(p *Process, files map[string]string) ([]Reason, error) {
	proc := filepath.Dir(p.dir())
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var reasons []Reason
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == p.PID || pid == os.Getpid() {
			continue
		}
		mappings, err := pagetable.Maps(pid)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH), errors.Is(err, fs.ErrPermission):
			continue // ended, or not ours to look at
		case err != nil:
			// Who can make its mappings unreadable must not hide by it.
			reasons = append(reasons, Reason{CodeSharedWriter, fmt.Sprintf("process %d cannot be looked at for whether it can write the guest's memory: %v", pid, err)})
			continue
		}
		for _, m := range mappings {
			block, ours := files[device(m)+" "+strconv.FormatUint(m.Inode, 10)]
			if ours && m.Inode != 0 && m.Shared && m.Write {
				name, _ := readBounded(filepath.Join(proc, e.Name(), "comm"), 64)
				reasons = append(reasons, Reason{CodeSharedWriter,
					fmt.Sprintf("process %d (%s) can write RAM block %q", pid, strings.TrimSpace(string(name)), block)})
				break
			}
		}
	}
	return reasons, nil
}
