package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

func TestMain(m *testing.M) {
	guard.Main()
	inject.Main()
	supervise.Main(map[string]supervise.Job{"doomed capture": doomedCapture}, func(error) string { return "" })
	os.Exit(m.Run())
}

// doomed asks for a capture in a worker that kills itself.
type doomed struct {
	PID        int
	Socket     string
	Repository string
	Options    capture.Options
	At         capture.Step
	Family     bool // its children die with it, as with its cgroup
}

// key is that of all repositories here.
var key = image.Keys{Secret: [32]byte{1, 2, 3}}

func doomedCapture(ctx context.Context, request json.RawMessage, _ func(any)) (any, error) {
	var r doomed
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, err
	}
	process, err := qemu.Find(ctx, qemu.Selector{PID: r.PID})
	if err != nil {
		return nil, err
	}
	monitor, err := qemu.DialUnix(ctx, r.Socket)
	if err != nil {
		return nil, err
	}
	repository, err := image.OpenRepository(r.Repository, key)
	if err != nil {
		return nil, err
	}
	r.Options.Hooks.Step = func(at capture.Step) {
		if at != r.At {
			return
		}
		if r.Family {
			for _, pid := range children(os.Getpid()) {
				unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may have ended
			}
		}
		unix.Kill(os.Getpid(), unix.SIGKILL) //nolint:errcheck // the test shows
		select {}
	}
	return capture.Run(ctx, capture.Target{Process: process, Monitor: monitor}, repository, r.Options)
}

// children lists the processes that a process has started and that have not ended.
func children(pid int) []int {
	var pids []int
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) //nolint:errcheck // the pattern is well formed
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, word := range strings.Fields(string(text)) {
			var child int
			if _, err := fmt.Sscan(word, &child); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

// holder finds the process that holds the leash, a child of this one; 0 where there is none.
func holder() int {
	for _, pid := range children(os.Getpid()) {
		if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err == nil && strings.Contains(string(env), "VMCKPT_LEASH_HOLD_AT_BYTES=") {
			return pid
		}
	}
	return 0
}
