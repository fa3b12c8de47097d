package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// TestRestoreKilledAfterItsStop has a restore killed between its stop of the machine and the first byte: by its worker alone, and the
// machine goes on; or with all that could have let it go on, and the next command says so.
func TestRestoreKilledAfterItsStop(t *testing.T) {
	s, records := newShell(t), t.TempDir()
	m := machine.Start(t, machine.Options{MemoryBytes: 64 * machine.MiB, Guest: machine.Writer{
		Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, Spin: 100_000},
	}})
	name := m.Options().Name
	goesOn(t, m)
	process[captureJSON](s, records, 0, "capture", name, "--name", "base")

	t.Run("the worker", func(t *testing.T) {
		exit, answer := killAtStop(t, m, s.command(records, "restore", "base", name, "--in-place", "--output", "json"), false)
		var failed struct{ Error failureJSON }
		if err := json.Unmarshal(answer, &failed); err != nil {
			t.Fatal(err)
		}
		if exit != exitUnexpected || failed.Error.Code != jobs.CodeDied || !strings.Contains(failed.Error.Message, "was continued") {
			t.Errorf("exit code %d, %+v", exit, failed.Error)
		}
		if got := state(t, m); got != qemu.StateRunning {
			t.Fatalf("the machine is %s", got)
		}
		goesOn(t, m)
	})
	t.Run("all of it", func(t *testing.T) {
		killAtStop(t, m, s.command(records, "restore", "base", name, "--in-place"), true)
		if got := state(t, m); got != qemu.StatePaused {
			t.Fatalf("the machine is %s", got)
		}
		for _, args := range [][]string{{"capture", name, "--name", "still"}, {"release", name}, {"sweep"}} {
			if warned := s.warned(records, args...); !strings.Contains(warned, "a restore stopped") || !strings.Contains(warned, "virsh resume") {
				t.Errorf("vmckpt %v says nothing of it: %q", args, warned)
			}
		}
		if got := state(t, m); got != qemu.StatePaused {
			t.Errorf("the machine is %s: nobody knows whether its owner has paused it since", got)
		}
		if err := m.Continue(t.Context()); err != nil {
			t.Fatal(err)
		}
		goesOn(t, m)
		if warned := s.warned(records, "capture", name, "--name", "again"); warned != "" {
			t.Errorf("it was seen to run: %q", warned)
		}
		if warned := s.warned(records, "sweep"); warned != "" {
			t.Errorf("it was seen to run before: %q", warned)
		}
	})
}

// warned runs the program, which must succeed, and returns what it says beside its answer.
func (s *shell) warned(records string, args ...string) string {
	s.t.Helper()
	c := s.command(records, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	if err := c.Run(); err != nil {
		s.t.Fatalf("vmckpt %v: %v\n%s", args, err, stderr.String())
	}
	return stderr.String()
}

// killAtStop starts the program and kills its worker when the machine stops, or all of it at once.
func killAtStop(t *testing.T, m *machine.Machine, c *exec.Cmd, all bool) (exit int, answer []byte) {
	t.Helper()
	stops := m.Monitor.Subscribe("STOP")
	defer stops.Close()
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stops.C:
	case <-time.After(30 * time.Second):
		c.Process.Kill() //nolint:errcheck // the test has failed
		c.Wait()         //nolint:errcheck // as above
		t.Fatalf("the machine was not stopped:\n%s", stderr.String())
	}
	if all { // not one after the other: neither is to see the other's end
		if err := c.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	for _, worker := range children(t, c.Process.Pid) {
		if err := unix.Kill(worker, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if all {
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	c.Wait() //nolint:errcheck // its exit code says it
	t.Logf("%s", stderr.String())
	return c.ProcessState.ExitCode(), stdout.Bytes()
}

// children are the processes that a process has started.
func children(t *testing.T, pid int) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		for _, field := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, child)
		}
	}
	if len(pids) == 0 {
		t.Fatal("the program has no worker")
	}
	return pids
}
