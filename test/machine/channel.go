package machine

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
)

// Channel is a connection to the Linux guest's init over its virtio-serial port.
type Channel struct {
	conn net.Conn
	in   *bufio.Reader
}

// DialChannel connects to the Linux guest. One connection at a time.
func (m *Machine) DialChannel(ctx context.Context) (*Channel, error) {
	return dialChannel(ctx, filepath.Join(m.dir, channelSocket))
}

func dialChannel(ctx context.Context, path string) (*Channel, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest's channel: %w", err)
	}
	return &Channel{conn: conn, in: bufio.NewReader(conn)}, nil
}

// Close ends the connection.
func (c *Channel) Close() error { return c.conn.Close() }

// Work makes the guest write new content to the first mib MiB of its work area.
func (c *Channel) Work(ctx context.Context, mib int) error {
	done := "done " + strconv.Itoa(mib)
	_, err := c.ask(ctx, "work "+strconv.Itoa(mib), func(line string) bool { return line == done })
	return err
}

// Sleep sends the guest to sleep, to RAM (ACPI S3). It returns when the guest has heard of it; the machine shows as suspended soon after.
func (c *Channel) Sleep(ctx context.Context) error {
	_, err := c.ask(ctx, "sleep", func(line string) bool { return line == "sleeping" })
	return err
}

// State returns the counter's state.
func (c *Channel) State(ctx context.Context) (workload.State, error) {
	var state workload.State
	_, err := c.ask(ctx, "state", func(line string) (ok bool) {
		state, ok = workload.ParseState(line)
		return ok
	})
	return state, err
}

// ask sends a line and waits for one that is an answer to it. Others are passed over: in a restored guest, the answer to a
// question that was asked of the captured one may come first.
func (c *Channel) ask(ctx context.Context, line string, isAnswer func(string) bool) (string, error) {
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	fail := func(err error) (string, error) {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("ask the guest %q: %w", line, err)
	}
	if _, err := fmt.Fprintln(c.conn, line); err != nil {
		return fail(err)
	}
	for {
		answer, err := c.in.ReadString('\n')
		if err != nil {
			return fail(err)
		}
		answer = strings.TrimRight(answer, "\r\n")
		if strings.HasPrefix(answer, "error:") {
			return fail(fmt.Errorf("it answers %q", answer))
		}
		if isAnswer(answer) {
			return answer, nil
		}
	}
}
