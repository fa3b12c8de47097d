package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/machine"
)

// doomedQuestion asks QEMU something and dies before the answer.
func doomedQuestion(ctx context.Context, request json.RawMessage, _ func(any)) (any, error) {
	var path string
	if err := json.Unmarshal(request, &path); err != nil {
		return nil, err
	}
	// By hand, since the monitor's client would wait for the answer, or not be done sending.
	socket := int(supervise.Files(ctx)[0].Fd())
	if err := unix.SetNonblock(socket, false); err != nil {
		return nil, err
	}
	if err := unix.Connect(socket, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	for _, line := range []string{`{"execute": "qmp_capabilities"}`, `{"execute": "query-status"}`} {
		if _, err := unix.Read(socket, buf); err != nil {
			return nil, err
		}
		if _, err := unix.Write(socket, []byte(line+"\n")); err != nil {
			return nil, err
		}
	}
	unix.Kill(os.Getpid(), unix.SIGKILL) //nolint:errcheck // the supervisor sees
	select {}
}

// TestDiesMidCommand kills workers that have a command under way, of a QEMU whose threads take turns on one processor: so its monitor's
// threads are most often in each other's way. Without [qemu.Settle] QEMU 10.0 dies of it after some hundred.
func TestDiesMidCommand(t *testing.T) {
	m := machine.Start(t, machine.Options{QEMU: machine.V10, Accel: machine.TCG, MemoryBytes: 32 * machine.MiB, Guest: machine.Idle{}})
	if err := pin(m.PID); err != nil {
		t.Fatal(err)
	}
	for i := range 400 * *repeat {
		socket, err := qemu.NewSocket()
		if err != nil {
			t.Fatal(err)
		}
		err = supervise.Run(t.Context(), "doomed question", m.Socket, nil, supervise.Options{Files: []*os.File{socket}})
		var died *supervise.DiedError
		if !errors.As(err, &died) {
			t.Fatalf("worker %d: %v", i, err)
		}
		qemu.Settle(socket)
		select {
		case <-m.Exited():
			t.Fatalf("QEMU has ended after %d workers died", i+1)
		default:
		}
	}
	state, err := qemu.Status(t.Context(), m.Monitor)
	if err != nil || state != qemu.StateRunning {
		t.Errorf("the machine is %q: %v", state, err)
	}
}

// pin has all threads of a process run on one processor.
func pin(pid int) error {
	var one unix.CPUSet
	one.Set(0)
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return err
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &one); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("pin thread %d: %w", tid, err)
		}
	}
	return nil
}
