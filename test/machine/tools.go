package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Unavailable says that a machine cannot be started here, and what is missing: a reason to skip a test.
type Unavailable struct{ Missing string }

func (e *Unavailable) Error() string { return "not available here: " + e.Missing }

// CacheDir returns where hack/setup keeps what it unpacked: VMCKPT_CACHE, or .cache beside go.mod.
func CacheDir() (string, error) {
	if dir := os.Getenv("VMCKPT_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".cache"), nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no cache directory: VMCKPT_CACHE is not set, and no go.mod above the working directory")
		}
		dir = parent
	}
}

// FindQEMU returns the path of a QEMU of the version: the one hack/setup unpacked, or the system's own. Where there is
// none, the error is *Unavailable.
func FindQEMU(ctx context.Context, v Version) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	candidates := []string{filepath.Join(cache, "qemu-"+strings.TrimSuffix(string(v), ".0"), "qemu-system-x86_64")}
	if system, err := exec.LookPath("qemu-system-x86_64"); err == nil {
		candidates = append(candidates, system)
	}
	for _, path := range candidates {
		out, err := exec.CommandContext(ctx, path, "--version").Output()
		if err == nil && strings.Contains(string(out), "version "+string(v)+".") {
			return path, nil
		}
	}
	return "", &Unavailable{fmt.Sprintf("QEMU %s (run hack/setup)", v)}
}

// UsableAccel returns *Unavailable where the accelerator cannot be used.
func UsableAccel(a Accel) error {
	if a != KVM {
		return nil
	}
	if err := unix.Access("/dev/kvm", unix.R_OK|unix.W_OK); err != nil {
		return &Unavailable{fmt.Sprintf("KVM (/dev/kvm: %v)", err)}
	}
	return nil
}
