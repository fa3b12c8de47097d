package linux

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

//go:embed init/*.go workload/*.go linux.go cpio.go
var source embed.FS

// Modules are what init loads, each with its dependencies. Those that a kernel has built in are left out.
func Modules() []string {
	return []string{"virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_balloon"}
}

// Initramfs returns the path of an initramfs in the directory cache for the kernel in kernelDir, and builds it if it is not
// there. It needs the go command; where that is missing the error is an *exec.Error.
func Initramfs(ctx context.Context, cache, kernelDir string) (string, error) {
	release, err := os.ReadFile(filepath.Join(kernelDir, "release"))
	if err != nil {
		return "", fmt.Errorf("build the initramfs: %w", err)
	}
	sum, err := sourceSum()
	if err != nil {
		return "", fmt.Errorf("build the initramfs: %w", err)
	}
	path := filepath.Join(cache, fmt.Sprintf("initramfs-%s-%s.cpio", strings.TrimSpace(string(release)), sum))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := build(ctx, cache, kernelDir, path); err != nil {
		return "", fmt.Errorf("build the initramfs: %w", err)
	}
	return path, nil
}

// sourceSum changes with the sources of the guest and with the Go that builds them.
func sourceSum() (string, error) {
	sum := sha256.New()
	io.WriteString(sum, runtime.Version())
	err := fs.WalkDir(source, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := source.ReadFile(path)
		fmt.Fprintf(sum, "%s %d\n", path, len(content))
		sum.Write(content)
		return err
	})
	return hex.EncodeToString(sum.Sum(nil)[:8]), err
}

func build(ctx context.Context, cache, kernelDir, path string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(cache, "initramfs-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", binary,
		"github.com/vmckpt/vmckpt/test/guest/linux/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build init: %w\n%s", err, out)
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	archive := filepath.Join(dir, "initramfs")
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	w := &cpioWriter{w: f}
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		w.directory(d)
	}
	w.characterDevice("dev/console", 5, 1)
	w.file("init", 0o755, program)
	if err := addModules(w, filepath.Join(kernelDir, "modules")); err != nil {
		return err
	}
	if err := w.close(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(archive, path)
}

// addModules adds the modules and the file "order", which names them so that each comes after what it depends on.
func addModules(w *cpioWriter, dir string) error {
	var order []string
	added := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if added[name] {
			return nil
		}
		added[name] = true
		content, err := os.ReadFile(filepath.Join(dir, name+".ko"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // built in
		}
		if err != nil {
			return err
		}
		depends, err := dependencies(filepath.Join(dir, name+".ko"))
		if err != nil {
			return err
		}
		for _, d := range depends {
			if err := add(d); err != nil {
				return err
			}
		}
		order = append(order, name+".ko")
		w.file("modules/"+name+".ko", 0o644, content)
		return nil
	}
	for _, name := range Modules() {
		if err := add(name); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	w.file("modules/order", 0o644, []byte(strings.Join(order, "\n")))
	return nil
}

// dependencies returns the modules that a module's own description (section .modinfo, strings that end in 0) says it needs.
func dependencies(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s has no .modinfo", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, found := strings.CutPrefix(field, "depends="); found && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
