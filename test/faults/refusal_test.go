package faults

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestStates: a machine that never ran is refused, and left as it is.
func TestStates(t *testing.T) {
	o := options()
	o.Paused = true
	b := truth.NewBench(t, o)
	if _, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options()); !errors.Is(err, capture.ErrStopped) {
		t.Errorf("a machine that was never started: error %v", err)
	}
	if state, err := qemu.Status(t.Context(), b.Machine.Monitor); err != nil || state != qemu.StatePrelaunch {
		t.Errorf("it is %q, %v", state, err)
	}
}

// mappedVariable names a file for this process to map, in place of testing.
const mappedVariable = "VMCKPT_FAULTS_MAP"

// mapFile maps a file for writing and waits for the end of its standard input, if this process was started for that.
func mapFile() {
	path := os.Getenv(mappedVariable)
	if path == "" {
		return
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = unix.Mmap(int(file.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "map the memory of a machine:", err)
		os.Exit(1)
	}
	fmt.Println("mapped")
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // it is the end in any case
	os.Exit(0)
}
