package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// Version is that of a QEMU.
type Version struct {
	Major   int    `json:"major"`
	Minor   int    `json:"minor"`
	Micro   int    `json:"micro"`
	Package string `json:"package,omitempty"` // the distribution's name of its build
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Compare is negative where v is older than o, by major, minor and micro.
func (v Version) Compare(o Version) int {
	for _, d := range [...]int{v.Major - o.Major, v.Minor - o.Minor, v.Micro - o.Micro} {
		if d != 0 {
			return d
		}
	}
	return 0
}

// qmpMessage is any message of QEMU: greeting, answer, error or event (QEMU, docs/interop/qmp-spec).
type qmpMessage struct {
	Greeting  *json.RawMessage `json:"QMP"`
	ID        json.RawMessage  `json:"id"`
	Return    json.RawMessage  `json:"return"`
	Error     *qmpErrorBody    `json:"error"`
	Event     string           `json:"event"`
	Data      json.RawMessage  `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// known reports whether m is an answer, an error or an event.
func (m *qmpMessage) known() bool { return m.Return != nil || m.Error != nil || m.Event != "" }

type qmpErrorBody struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

type qmpRequest struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        any    `json:"id,omitempty"`
}

// answer unpacks what QEMU said to command into result.
func (m *qmpMessage) answer(command string, result any) error {
	if m.Error != nil {
		return &QMPError{Command: command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if m.Return == nil {
		return fmt.Errorf("%s: answer has neither return nor error", command)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%s: decode the answer: %w", command, err)
	}
	return nil
}

// boundedReader ends the connection of a peer that sends one message without end. The bound is checked as bytes arrive,
// before they are parsed; the decoder's reading ahead may count a little of the next message in.
type boundedReader struct {
	r    io.Reader
	left int
}

var errMessageTooLong = fmt.Errorf("message longer than %d bytes", MaxMessageBytes)

func (b *boundedReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errMessageTooLong
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// socketMonitor is a QMP connection of our own.
type socketMonitor struct {
	conn net.Conn
	hub  eventHub

	write chan struct{} // holds one token: who has it may write

	mu         sync.Mutex
	next       uint64 // id of the next command
	waiting    map[uint64]chan *qmpMessage
	unanswered map[uint64]struct{} // sent, whether somebody still waits for the answer or not
	err        error               // what ended the connection
	done       chan struct{}       // closed when err is set
	settled    chan struct{}       // made by Close; closed when nothing is unanswered
}

// DialUnix connects to a QMP socket by its path on this machine. QEMU serves one client at a time on such a socket: where
// another is connected the greeting does not come, and ctx should have a deadline.
func DialUnix(ctx context.Context, path string) (Monitor, error) {
	socket, err := NewSocket()
	if err != nil {
		return nil, err
	}
	return DialOn(ctx, socket, path)
}

// DialOn is DialUnix by a socket of [NewSocket], which it takes over.
func DialOn(ctx context.Context, socket *os.File, path string) (Monitor, error) {
	defer socket.Close()
	conn, err := connect(ctx, socket, path)
	if err != nil {
		return nil, fmt.Errorf("connect to the QMP socket %s: %w", path, err)
	}
	// QEMU does not forget what an earlier client has asked: the answer to a worker that died comes to the next one. Ids that begin anywhere
	// keep it from passing for the answer to a question of ours.
	m, err := newSocketMonitor(ctx, conn, rand.Uint64N(1<<52))
	if err != nil {
		return nil, fmt.Errorf("QMP socket %s: %w", path, err)
	}
	return m, nil
}

// newSocketMonitor takes conn over, waits for the greeting and leaves negotiation mode. firstID is that of its first command.
func newSocketMonitor(ctx context.Context, conn net.Conn, firstID uint64) (*socketMonitor, error) {
	m := &socketMonitor{
		conn:       conn,
		next:       firstID,
		write:      make(chan struct{}, 1),
		waiting:    make(map[uint64]chan *qmpMessage),
		unanswered: make(map[uint64]struct{}),
		done:       make(chan struct{}),
	}
	m.write <- struct{}{}
	greeted := make(chan struct{})
	go m.read(greeted)

	select {
	case <-greeted:
	case <-m.done:
		return nil, m.failure()
	case <-ctx.Done():
		m.fail(ctx.Err())
		return nil, fmt.Errorf("wait for the greeting (is another client connected?): %w", ctx.Err())
	}
	// Out-of-band execution is not asked for: QEMU then answers in order and reads no further than one command ahead.
	if err := m.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// maxEarlierMessages bounds what may come before the greeting. QEMU's main thread may be answering a client that is gone, or telling it an
// event, just when its I/O thread has taken the next one: that message then goes to the new client, before the greeting.
const maxEarlierMessages = 64

// read dispatches messages until the connection ends.
func (m *socketMonitor) read(greeted chan<- struct{}) {
	in := &boundedReader{r: m.conn, left: MaxMessageBytes}
	dec := json.NewDecoder(in)
	earlier := 0 // messages before the greeting
	for hasGreeted := false; ; {
		in.left = MaxMessageBytes
		var msg qmpMessage
		if err := dec.Decode(&msg); err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("connection closed by qemu: %w", io.ErrUnexpectedEOF)
			}
			m.fail(fmt.Errorf("read from the monitor: %w", err))
			return
		}
		switch {
		case msg.Greeting != nil && !hasGreeted:
			hasGreeted = true
			close(greeted)
		case !hasGreeted:
			if earlier++; !msg.known() || earlier > maxEarlierMessages {
				m.fail(errors.New("the peer does not greet as QMP does"))
				return
			}
		case msg.Event != "":
			m.hub.publish(Event{
				Name: msg.Event,
				Time: time.Unix(msg.Timestamp.Seconds, 0).Add(time.Duration(msg.Timestamp.Microseconds) * time.Microsecond),
				Data: msg.Data,
			})
		default:
			if err := m.deliver(&msg); err != nil {
				m.fail(err)
				return
			}
		}
	}
}

// deliver hands an answer to its waiter. One that nobody waits for is dropped: its waiter gave up, or was another client that is gone.
func (m *socketMonitor) deliver(msg *qmpMessage) error {
	if msg.ID == nil && msg.Error != nil {
		return fmt.Errorf("qemu could not read our command: %s", msg.Error.Desc)
	}
	var id uint64
	if err := json.Unmarshal(msg.ID, &id); err != nil {
		return nil // of a client that counts otherwise
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.waiting[id]; c != nil {
		delete(m.waiting, id)
		c <- msg // buffered
	}
	delete(m.unanswered, id)
	if m.settled != nil && len(m.unanswered) == 0 {
		close(m.settled)
		m.settled = nil
	}
	return nil
}

func (m *socketMonitor) Execute(ctx context.Context, command string, args, result any) error {
	m.mu.Lock()
	id := m.next
	m.next++
	answer := make(chan *qmpMessage, 1)
	m.waiting[id] = answer
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
	}()

	line, err := json.Marshal(qmpRequest{Execute: command, Arguments: args, ID: id})
	if err != nil {
		return fmt.Errorf("encode the arguments of %s: %w", command, err)
	}
	if err := m.send(ctx, id, append(line, '\n')); err != nil {
		return fmt.Errorf("send %s: %w", command, err)
	}
	select {
	case msg := <-answer:
		return msg.answer(command, result)
	case <-ctx.Done():
		return fmt.Errorf("wait for the answer to %s: %w", command, ctx.Err())
	case <-m.done:
		select {
		case msg := <-answer: // it had come before the end
			return msg.answer(command, result)
		default:
			return fmt.Errorf("wait for the answer to %s: %w", command, m.failure())
		}
	}
}

// send writes one command whole. If ctx ends in the middle of it the connection is of no further use and is ended.
func (m *socketMonitor) send(ctx context.Context, id uint64, line []byte) error {
	select {
	case <-m.write:
	case <-ctx.Done():
		return ctx.Err()
	case <-m.done:
		return m.failure()
	}
	defer func() { m.write <- struct{}{} }()

	m.mu.Lock()
	m.unanswered[id] = struct{}{}
	m.mu.Unlock()
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		m.conn.SetWriteDeadline(time.Unix(1, 0))
		close(expired)
	})
	n, err := m.conn.Write(line)
	if !stop() {
		<-expired // or the deadline would hit the next writer
		m.conn.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case n == 0 && ctx.Err() != nil:
		m.mu.Lock()
		delete(m.unanswered, id)
		m.mu.Unlock()
		return ctx.Err()
	}
	m.fail(fmt.Errorf("write to the monitor: %w", err))
	return m.failure()
}

func (m *socketMonitor) Subscribe(events ...string) *Subscription { return m.hub.subscribe(events) }

// Close waits a while for answers that nobody waits for any more: see [Settle].
func (m *socketMonitor) Close() error {
	settled := make(chan struct{})
	m.mu.Lock()
	wait := len(m.unanswered) != 0 && m.settled == nil
	if wait {
		m.settled = settled
	}
	m.mu.Unlock()
	if wait {
		select {
		case <-settled:
		case <-m.done:
		case <-time.After(settleBound):
		}
	}
	m.fail(ErrMonitorClosed)
	return nil
}

// fail ends the connection for the first reason given.
func (m *socketMonitor) fail(err error) {
	m.mu.Lock()
	first := m.err == nil
	if first {
		m.err = err
		close(m.done)
	}
	m.mu.Unlock()
	if first {
		// Others may hold the socket too, whose duty is to see to the end of a process that was killed.
		if c, ok := m.conn.(*net.UnixConn); ok {
			c.CloseWrite() //nolint:errcheck // closed next
			c.CloseRead()  //nolint:errcheck // the same
		}
		m.conn.Close()
		m.hub.end(err)
	}
}

func (m *socketMonitor) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}
