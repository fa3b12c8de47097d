package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/machine"
)

// stack is what the figures were measured on.
type stack struct {
	CPU        string        `json:"cpu"`
	Cores      int           `json:"cores"`
	Kernel     string        `json:"kernel"`
	QEMU       string        `json:"qemu"`
	Accel      machine.Accel `json:"accel"`
	KVM        string        `json:"kvm,omitempty"`
	Go         string        `json:"go"`
	FileSystem string        `json:"fileSystem"`
}

// qemuVersion is the QEMU that is measured: the one of KubeVirt's time.
const qemuVersion = machine.V10

// fileSystems names the common ones by their magic (include/uapi/linux/magic.h).
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "nfs",
}

// describe looks at what is there: KVM where it can be used, else TCG.
func describe(ctx context.Context, dir string) (stack, error) {
	s := stack{CPU: "unknown", Cores: runtime.NumCPU(), Go: runtime.Version(), Accel: machine.TCG}
	if unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) == nil {
		s.Accel = machine.KVM
		s.KVM = "hardware virtualization"
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return s, err
	}
	if s.KVM != "" && !bytes.Contains(cpuinfo, []byte(" svm")) && !bytes.Contains(cpuinfo, []byte(" vmx")) {
		s.KVM = "a software back end: no hardware virtualization"
	}
	for line := range strings.Lines(string(cpuinfo)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			s.CPU = strings.TrimSpace(value)
			break
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return s, fmt.Errorf("ask for the kernel's name: %w", err)
	}
	s.Kernel = version(unix.ByteSliceToString(uts.Release[:]))
	qemu, err := machine.FindQEMU(ctx, qemuVersion)
	if err != nil {
		return s, err
	}
	out, err := exec.CommandContext(ctx, qemu, "--version").Output()
	if err != nil {
		return s, fmt.Errorf("ask %s for its version: %w", qemu, err)
	}
	_, s.QEMU, _ = strings.Cut(strings.SplitN(string(out), "\n", 2)[0], "version ")
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return s, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	s.FileSystem = fileSystems[int64(fs.Type)]
	if s.FileSystem == "" {
		s.FileSystem = fmt.Sprintf("file system %#x", fs.Type)
	}
	return s, nil
}

// version is what a kernel's release begins with: 6.18.44 of 6.18.44-cloud-amd64. The rest is whoever built it.
func version(release string) string {
	end := strings.IndexFunc(release, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if end < 0 {
		return release
	}
	return strings.TrimRight(release[:end], ".")
}

func (s stack) markdown() string {
	accel := strings.ToUpper(string(s.Accel))
	if s.KVM != "" {
		accel += " (" + s.KVM + ")"
	}
	return fmt.Sprintf("Measured on %d cores of %s, Linux %s, QEMU %s with %s, repository on %s, %s.",
		s.Cores, s.CPU, s.Kernel, s.QEMU, accel, s.FileSystem, s.Go)
}
