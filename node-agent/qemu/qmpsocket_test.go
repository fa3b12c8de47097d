package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

const greeting = `{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":""},"capabilities":["oob"]}}` + "\r\n"

// fakeQEMU is the other end of a monitor, played by the test.
type fakeQEMU struct {
	conn  net.Conn
	lines *bufio.Scanner
}

type fakeCommand struct {
	Execute string
	ID      uint64
}

func (q *fakeQEMU) next(t *testing.T) fakeCommand {
	t.Helper()
	var c fakeCommand
	if !q.lines.Scan() {
		t.Fatal("no further command")
	}
	if err := json.Unmarshal(q.lines.Bytes(), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func (q *fakeQEMU) say(format string, args ...any) { fmt.Fprintf(q.conn, format+"\r\n", args...) }

// converse connects a monitor to a fake QEMU that has greeted and left negotiation.
func converse(t *testing.T) (*socketMonitor, *fakeQEMU) {
	t.Helper()
	ours, theirs := net.Pipe()
	q := &fakeQEMU{theirs, bufio.NewScanner(theirs)}
	go func() {
		io.WriteString(theirs, greeting)
		if q.lines.Scan() {
			q.say(`{"return": {}, "id": 0}`)
		}
	}()
	m, err := newSocketMonitor(t.Context(), ours, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close(); theirs.Close() })
	return m, q
}

func TestAnswersOutOfOrder(t *testing.T) {
	m, q := converse(t)
	var wg sync.WaitGroup
	results := make(map[string]int)
	var mu sync.Mutex
	for _, name := range []string{"first", "second", "third"} {
		wg.Go(func() {
			var n int
			if err := m.Execute(t.Context(), name, nil, &n); err != nil {
				t.Error(err)
			}
			mu.Lock()
			results[name] = n
			mu.Unlock()
		})
	}
	commands := []fakeCommand{q.next(t), q.next(t), q.next(t)}
	for i := len(commands) - 1; i >= 0; i-- {
		q.say(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "NOISE"}`)
		q.say(`{"return": %d, "id": %d}`, len(commands[i].Execute), commands[i].ID)
	}
	wg.Wait()
	for name, n := range results {
		if n != len(name) {
			t.Errorf("%s was answered %d", name, n)
		}
	}
}

func TestCancelledWaiting(t *testing.T) {
	m, q := converse(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Execute(ctx, "slow", nil, nil) }()
	slow := q.next(t)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	go func() { done <- m.Execute(t.Context(), "quick", nil, nil) }()
	quick := q.next(t)
	q.say(`{"return": {}, "id": %d}`, slow.ID) // late, and for nobody
	q.say(`{"return": {}, "id": %d}`, quick.ID)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	m, q := converse(t)
	some, all, closed := m.Subscribe("STOP"), m.Subscribe(), m.Subscribe("STOP")
	closed.Close()
	q.say(`{"timestamp": {"seconds": 1795391664, "microseconds": 868864}, "event": "STOP"}`)
	q.say(`{"timestamp": {"seconds": 1795391664, "microseconds": 872863}, "event": "JOB", "data": {"id": 5}}`)
	if ev := <-some.C; ev.Name != "STOP" || ev.Time.UnixMicro() != 1795391664868864 || ev.Data != nil {
		t.Errorf("got %+v", ev)
	}
	<-all.C
	if ev := <-all.C; ev.Name != "JOB" || string(ev.Data) != `{"id": 5}` {
		t.Errorf("got %+v", ev)
	}
	if _, ok := <-closed.C; ok || closed.Err() != nil {
		t.Errorf("a closed subscription: %v, %v", ok, closed.Err())
	}
	for range subscriptionEvents + 1 {
		q.say(`{"timestamp": {"seconds": 1, "microseconds": 1}, "event": "FLOOD"}`)
	}
	q.say(`{"timestamp": {"seconds": 1, "microseconds": 1}, "event": "STOP"}`)
	<-some.C // all before it has been delivered
	n := 0
	for range all.C {
		n++
	}
	if n != subscriptionEvents || !errors.Is(all.Err(), ErrEventsLost) {
		t.Errorf("after a flood: %d events, then %v", n, all.Err())
	}
	m.Close()
	if _, ok := <-some.C; ok || !errors.Is(some.Err(), ErrMonitorClosed) {
		t.Errorf("after Close: %v", some.Err())
	}
	if late := m.Subscribe(); !errors.Is(late.Err(), ErrMonitorClosed) {
		t.Errorf("a late subscription: %v", late.Err())
	}
}

// TestMonitorPassesOverStaleAnswers: what QEMU answers to a client that is gone comes to the next one.
func TestMonitorPassesOverStaleAnswers(t *testing.T) {
	m, q := converse(t)
	done := make(chan error, 1)
	var n int
	go func() { done <- m.Execute(t.Context(), "c", nil, &n) }()
	q.next(t)
	q.say(`{"return": 7, "id": 99}`)
	q.say(`{"error": {"class": "GenericError", "desc": "saving Xen device state failed"}, "id": 25}`)
	q.say(`{"return": {}, "id": "libvirt-1"}`)
	q.say(`{"return": 3, "id": 1}`)
	if err := <-done; err != nil || n != 3 {
		t.Errorf("answer %d, error %v", n, err)
	}
}

func TestMonitorRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		say  string
		want string
	}{
		"an error without id":  {`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`, "JSON parse error"},
		"no JSON":              {"garbage", "invalid character"},
		"the end":              {"", "closed by qemu"},
		"neither return value": {`{"id": 1}`, "neither return nor error"},
		"another type":         {`{"return": [], "id": 1}`, "decode the answer"},
		"an error":             {`{"error": {"class": "C", "desc": "D"}, "id": 1}`, "qemu refused c: D"},
	} {
		t.Run(name, func(t *testing.T) {
			m, q := converse(t)
			done := make(chan error, 1)
			go func() {
				var n int
				done <- m.Execute(t.Context(), "c", nil, &n)
			}()
			q.next(t)
			if c.say == "" {
				q.conn.Close()
			} else {
				q.say("%s", c.say)
			}
			if err := <-done; err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestEndlessMessage(t *testing.T) {
	m, q := converse(t)
	done := make(chan error, 1)
	go func() { done <- m.Execute(t.Context(), "c", nil, nil) }()
	q.next(t)
	go func() {
		q.conn.Write([]byte(`{"return": "`))
		blank := []byte(strings.Repeat("x", 64<<10))
		for {
			if _, err := q.conn.Write(blank); err != nil {
				return
			}
		}
	}()
	if err := <-done; !errors.Is(err, errMessageTooLong) {
		t.Errorf("got %v", err)
	}
}

func TestGreeting(t *testing.T) {
	for name, c := range map[string]struct{ say, want string }{
		"none":                {"", "is another client connected?"},
		"another protocol":    {"SSH-2.0-OpenSSH_9.2\r\n", "invalid character"},
		"JSON of other kinds": {`{"jsonrpc": "2.0"}`, "does not greet as QMP does"},
		"answers without end": {strings.Repeat(`{"return": {}}`+"\r\n", maxEarlierMessages+1), "does not greet as QMP does"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			go io.WriteString(theirs, c.say)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if _, err := newSocketMonitor(ctx, ours, 0); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// TestMessagesBeforeGreeting: what was meant for a client that is gone is no answer to this one.
func TestMessagesBeforeGreeting(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	q := &fakeQEMU{theirs, bufio.NewScanner(theirs)}
	go func() {
		q.say(`{"error": {"class": "GenericError", "desc": "saving Xen device state failed"}, "id": 0}`)
		q.say(`{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}`)
		q.say(`{"return": {}, "id": 7}`)
		io.WriteString(theirs, greeting)
		if q.lines.Scan() {
			q.say(`{"return": {}, "id": 0}`)
		}
	}()
	m, err := newSocketMonitor(t.Context(), ours, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// replay is a connection whose other end has said all it will say.
type replay struct {
	net.Conn // nil: not called
	r        io.Reader
}

func (r replay) Read(p []byte) (int, error)       { return r.r.Read(p) }
func (r replay) Write(p []byte) (int, error)      { return len(p), nil }
func (r replay) Close() error                     { return nil }
func (r replay) SetWriteDeadline(time.Time) error { return nil }

func FuzzMonitor(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": 0}` + "\n" + `{"return": {"status": "running"}, "id": 1}`))
	f.Add([]byte(greeting + `{"return": {}, "id": 0}{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": -1}}`))
	f.Add([]byte(greeting + `{"return": {}, "id": 0}{"error": {"class": "x"}, "id": 1}`))
	f.Fuzz(func(t *testing.T, said []byte) {
		m, err := newSocketMonitor(t.Context(), replay{r: strings.NewReader(string(said))}, 0)
		if err != nil {
			return
		}
		Status(t.Context(), m)
		if _, ok := <-m.done; ok {
			t.Error("the connection did not end")
		}
	})
}
