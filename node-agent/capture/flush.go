package capture

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

const (
	// restfulFlush is how long flushing all disks may take for them to count as at rest: stopping the machine flushes them again.
	restfulFlush = 5 * time.Millisecond

	// flushBound is how long the disks may take to come to rest.
	flushBound = 10 * time.Second
)

// UnrestfulError says that the disks never came to rest: stopping the machine would make it wait for them.
type UnrestfulError struct {
	Waited, Last time.Duration
}

func (e *UnrestfulError) Error() string {
	return fmt.Sprintf("the machine's disks did not come to rest in %v: the last flush took %v, and the guest would have stood still for it",
		e.Waited.Round(time.Millisecond), e.Last.Round(time.Millisecond))
}

// settleDisks flushes the machine's writable disks until that is quick, with the guest running, so that QEMU's own flush as it stops
// the machine has little left to do.
func settleDisks(ctx context.Context, p *qemu.Process, m qemu.Monitor) error {
	nodes, err := writableNodes(ctx, m)
	if err != nil || len(nodes) == 0 {
		return err
	}
	// First from here, by the files that QEMU has open: QEMU's own flush keeps the guest from its devices for as long as it takes.
	if err := syncFiles(ctx, p); err != nil {
		return err
	}
	begin := time.Now()
	for {
		once := time.Now()
		for _, node := range nodes {
			out, err := qemu.Human(ctx, m, fmt.Sprintf("qemu-io %q flush", node))
			if err != nil {
				return fmt.Errorf("flush disk %s: %w", node, err)
			}
			// It prints nothing when all is well. A disk that was unplugged a moment ago has nothing to be flushed.
			if out = strings.TrimSpace(out); out != "" && !strings.Contains(out, "not found") && !strings.Contains(out, "annot find device") {
				return fmt.Errorf("flush disk %s: %s", node, out)
			}
		}
		switch took := time.Since(once); {
		case took < restfulFlush*time.Duration(len(nodes)):
			return nil
		case time.Since(begin) > flushBound:
			return &UnrestfulError{Waited: time.Since(begin), Last: took}
		}
	}
}

// syncFiles syncs what QEMU has open for writing of files and block devices. It does what it can: what it cannot sync, QEMU's flush will.
func syncFiles(ctx context.Context, p *qemu.Process) error {
	files, err := inject.OpenForWriting(p.PID)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, f := range files {
			unix.Fdatasync(int(f.Fd())) //nolint:errcheck // the guest is told of it by its own flush
			f.Close()
		}
	}()
	select {
	case <-done:
		return nil
	case <-time.After(flushBound): // QEMU's flush tells how far it has come
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// writableNodes names the block nodes on top of each disk that the guest can write.
func writableNodes(ctx context.Context, m qemu.Monitor) ([]string, error) {
	var disks []struct {
		Device   string `json:"device"`
		Inserted *struct {
			Node     string `json:"node-name"`
			ReadOnly bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := m.Execute(ctx, "query-block", nil, &disks); err != nil {
		return nil, fmt.Errorf("ask for the disks: %w", err)
	}
	var nodes []string
	for _, d := range disks {
		if d.Inserted == nil || d.Inserted.ReadOnly {
			continue
		}
		// A disk of -drive has a device name and a generated node name; one of -blockdev only the latter.
		if d.Device != "" {
			nodes = append(nodes, d.Device)
		} else if d.Inserted.Node != "" {
			nodes = append(nodes, d.Inserted.Node)
		}
	}
	return nodes, nil
}
