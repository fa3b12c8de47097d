package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"
)

// MaxMessageBytes bounds one message of a monitor. The largest honest answers are those of query-qmp-schema and of
// `info mtree` on machines with many devices: a few hundred kilobytes.
const MaxMessageBytes = 16 << 20

// Monitor sends commands to one QEMU. It may be used by several goroutines at once. QEMU works on one command at a
// time, so a command waits for those before it; a context that ends stops the waiting, not the command.
type Monitor interface {
	// Execute sends one QMP command and stores what it returns in result, which may be nil. args is encoded as JSON
	// and may be nil. A command that QEMU refused gives a *QMPError.
	Execute(ctx context.Context, command string, args, result any) error

	// Subscribe delivers the events with the given names, or all of them, that arrive from now on.
	Subscribe(events ...string) *Subscription

	// Close ends the connection; commands that are waiting fail with ErrMonitorClosed.
	Close() error
}

// ErrMonitorClosed is what commands and subscriptions end with after Close.
var ErrMonitorClosed = errors.New("monitor closed")

// ErrEventsLost ends a subscription whose reader was too slow: what it saw is not all there was.
var ErrEventsLost = errors.New("events lost: subscriber too slow")

// QMPError is QEMU's refusal of a command.
type QMPError struct {
	Command string
	Class   string // GenericError, CommandNotFound, DeviceNotFound, ... (QEMU, qapi/error.json)
	Desc    string
}

func (e *QMPError) Error() string { return fmt.Sprintf("qemu refused %s: %s", e.Command, e.Desc) }

// Event is an asynchronous message of QEMU.
type Event struct {
	Name string
	Time time.Time // QEMU's own stamp, in microseconds; when it happened, not when it arrived
	Data json.RawMessage
}

// Human runs a command of the human monitor and returns what it prints. Such commands have no errors of their own: a
// command that failed prints that it did.
func Human(ctx context.Context, m Monitor, line string) (string, error) {
	args := struct {
		Line string `json:"command-line"`
	}{line}
	var out string
	if err := m.Execute(ctx, "human-monitor-command", args, &out); err != nil {
		return "", fmt.Errorf("human monitor %q: %w", line, err)
	}
	return out, nil
}

// subscriptionEvents is how many events wait for a reader before the subscription is given up.
const subscriptionEvents = 256

// Subscription is a view of the events of a monitor. C is closed when no more will come; Err then says why.
type Subscription struct {
	C <-chan Event

	c     chan Event
	names map[string]bool // nil: all
	hub   *eventHub
	err   error // guarded by hub.mu
}

// Close ends the subscription. C is closed, and what waits in it can still be read.
func (s *Subscription) Close() { s.hub.drop(s, nil) }

// Err says why C was closed: nil after Close, ErrEventsLost, or what ended the monitor.
func (s *Subscription) Err() error {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	return s.err
}

// eventHub hands events to subscriptions and never waits for one: the reader of the connection must go on.
type eventHub struct {
	mu     sync.Mutex
	subs   map[*Subscription]bool
	closed bool
	err    error
}

func (h *eventHub) subscribe(names []string) *Subscription {
	s := &Subscription{c: make(chan Event, subscriptionEvents), hub: h}
	s.C = s.c
	if len(names) > 0 {
		s.names = make(map[string]bool, len(names))
		for _, n := range names {
			s.names[n] = true
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		s.err = h.err
		close(s.c)
		return s
	}
	if h.subs == nil {
		h.subs = make(map[*Subscription]bool)
	}
	h.subs[s] = true
	return s
}

func (h *eventHub) publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subs {
		if s.names != nil && !s.names[e.Name] {
			continue
		}
		select {
		case s.c <- e:
		default:
			h.dropLocked(s, ErrEventsLost)
		}
	}
}

func (h *eventHub) drop(s *Subscription, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropLocked(s, err)
}

func (h *eventHub) dropLocked(s *Subscription, err error) {
	if !h.subs[s] {
		return
	}
	delete(h.subs, s)
	s.err = err
	close(s.c)
}

// end closes every subscription, now and to come, with err.
func (h *eventHub) end(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.closed, h.err = true, err
	for s := range h.subs {
		h.dropLocked(s, err)
	}
}

// asQMPError finds QEMU's refusal in an error, or returns nil.
func asQMPError(err error) *QMPError {
	var e *QMPError
	errors.As(err, &e)
	return e
}
