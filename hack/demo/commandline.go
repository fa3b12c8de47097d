package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// commandLine tells the story by vmckpt.
type commandLine struct {
	*demo
	env []string
}

func (c *commandLine) prepare() error {
	c.env = append(os.Environ(), "VMCKPT_REPO="+filepath.Join(c.dir, "repository"), "VMCKPT_KEY="+filepath.Join(c.dir, "key"))
	return c.vmckpt(nil, "init")
}

func (c *commandLine) capture(name string) (result captureResult, err error) {
	return result, c.vmckpt(&result, "capture", "demo_web", "--name", name, "--record-dir", c.dir)
}

func (c *commandLine) list(last string) error {
	if err := c.vmckpt(nil, "list"); err != nil {
		return err
	}
	return c.vmckpt(nil, "verify", last)
}

func (c *commandLine) replaced() error { return nil }

func (c *commandLine) restore(image string, inPlace bool) error {
	args := []string{"restore", image, "demo_web", "--run", "--record-dir", c.dir}
	if inPlace {
		args = append(args, "--in-place", "--full-compare")
	}
	return c.vmckpt(nil, args...)
}

func (c *commandLine) close() error { return nil }

// vmckpt runs a command as a user would. With result, its answer is asked for as JSON and put there.
func (c *commandLine) vmckpt(result any, args ...string) error {
	fmt.Printf("  $ vmckpt %s\n", strings.Join(args, " "))
	if result != nil {
		args = append(args, "--output", "json")
	}
	var answer bytes.Buffer
	cmd := exec.CommandContext(c.ctx, filepath.Join(c.bin, "vmckpt"), args...)
	cmd.Env = c.env
	cmd.Stdout, cmd.Stderr = &answer, os.Stderr
	// An interrupt at the terminal comes to it by us, once: a second one would end its worker at once.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	err := cmd.Run()
	if result == nil {
		io.WriteString(os.Stdout, "    "+strings.ReplaceAll(strings.TrimRight(answer.String(), "\n"), "\n", "\n    ")+"\n")
	}
	if err != nil {
		return fmt.Errorf("vmckpt %s: %w", strings.Join(args, " "), err)
	}
	if result != nil {
		if err := json.Unmarshal(answer.Bytes(), result); err != nil {
			return fmt.Errorf("the answer of vmckpt %s: %w", args[0], err)
		}
	}
	return nil
}
