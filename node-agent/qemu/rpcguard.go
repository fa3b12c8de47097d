package qemu

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// The numbers of libvirt's RPC that we use (libvirt, src/rpc/virnetprotocol.x, src/remote/remote_protocol.x and
// qemu_protocol.x).
const (
	rpcLengthBytes = 4
	rpcHeaderBytes = rpcLengthBytes + 24 // length; program, version, procedure, type, serial, status

	rpcProgramRemote = 0x20008086
	rpcProgramQEMU   = 0x20008087

	rpcTypeReply   = 1
	rpcTypeMessage = 2

	rpcStatusOK    = 0
	rpcStatusError = 1

	rpcQEMUMonitorEvent = 6
)

// rpcReplies says what the payload of a good reply is made of, for every procedure that is called here: s a string, u a
// UUID, i a 32-bit integer, a an array of such.
var rpcReplies = map[[2]uint32]string{
	{rpcProgramRemote, 1}:  "",    // CONNECT_OPEN
	{rpcProgramRemote, 2}:  "",    // CONNECT_CLOSE
	{rpcProgramRemote, 23}: "sui", // DOMAIN_LOOKUP_BY_NAME: name, UUID, id
	{rpcProgramRemote, 66}: "a",   // AUTH_LIST
	{rpcProgramRemote, 70}: "i",   // AUTH_POLKIT
	{rpcProgramQEMU, 1}:    "s",   // DOMAIN_MONITOR_COMMAND
	{rpcProgramQEMU, 4}:    "i",   // CONNECT_DOMAIN_MONITOR_EVENT_REGISTER
}

// rpcGuard stands between a libvirt of unknown intent and the RPC library, which believes every length that it is told.
// It hands on whole messages, of a bounded size and a known shape, each a reply to a call that is waiting for one. QEMU's
// events it takes out and delivers itself: the library drops those without details, and STOP and RESUME have none.
type rpcGuard struct {
	net.Conn
	event func(domain string, e Event)
	ended func(error)

	ready []byte // checked, and not read by the library yet

	mu      sync.Mutex
	calls   map[uint32]bool // serials of calls without a reply
	header  []byte          // of the message being written, as far as it has come
	payload int64           // bytes of it still to come
}

func (g *rpcGuard) Read(p []byte) (int, error) {
	for len(g.ready) == 0 {
		if err := g.next(); err != nil {
			g.ended(err)
			return 0, io.EOF // after some other errors the library would go on
		}
	}
	n := copy(p, g.ready)
	g.ready = g.ready[n:]
	return n, nil
}

// Write notes the serials of the calls that go out. The library writes a message in as many pieces as it likes.
func (g *rpcGuard) Write(p []byte) (int, error) {
	g.mu.Lock()
	for rest := p; len(rest) > 0; {
		if g.payload > 0 {
			n := min(g.payload, int64(len(rest)))
			g.payload -= n
			rest = rest[n:]
			continue
		}
		n := min(rpcHeaderBytes-len(g.header), len(rest))
		g.header = append(g.header, rest[:n]...)
		rest = rest[n:]
		if len(g.header) == rpcHeaderBytes {
			g.payload = int64(binary.BigEndian.Uint32(g.header)) - rpcHeaderBytes
			g.calls[binary.BigEndian.Uint32(g.header[20:])] = true
			g.header = g.header[:0]
		}
	}
	g.mu.Unlock()
	return g.Conn.Write(p)
}

// next reads one message and makes it ready, if it is for the library.
func (g *rpcGuard) next() error {
	var length [rpcLengthBytes]byte
	if _, err := io.ReadFull(g.Conn, length[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n < rpcHeaderBytes || n > MaxMessageBytes {
		return fmt.Errorf("libvirt sends a message of %d bytes", n)
	}
	msg := make([]byte, n)
	copy(msg, length[:])
	if _, err := io.ReadFull(g.Conn, msg[rpcLengthBytes:]); err != nil {
		return err
	}
	be := binary.BigEndian
	program, procedure, kind, serial, status := be.Uint32(msg[4:]), be.Uint32(msg[12:]), be.Uint32(msg[16:]), be.Uint32(msg[20:]), be.Uint32(msg[24:])
	payload := xdrReader{msg[rpcHeaderBytes:], true}
	switch {
	case kind == rpcTypeMessage && program == rpcProgramQEMU && procedure == rpcQEMUMonitorEvent:
		domain, e, err := monitorEvent(payload)
		if err != nil {
			return err
		}
		g.event(domain, e)
		return nil
	case kind != rpcTypeReply:
		return nil // libvirt's own events and keep-alives: nobody asked for them
	}
	g.mu.Lock()
	waiting := g.calls[serial]
	delete(g.calls, serial)
	g.mu.Unlock()
	if !waiting {
		return fmt.Errorf("libvirt replies to call %d, which nobody waits for", serial)
	}
	if !wellFormed(program, procedure, status, payload) {
		return fmt.Errorf("libvirt's reply to procedure %d of program %#x is malformed", procedure, program)
	}
	g.ready = msg
	return nil
}

func wellFormed(program, procedure, status uint32, p xdrReader) bool {
	switch status {
	case rpcStatusError: // remote_error: code, domain, optional message, level, and more that the library does not read
		p.u32()
		p.u32()
		if p.u32() != 1 {
			return false // the library believes that there is a message
		}
		p.str()
		p.u32()
		return p.ok
	case rpcStatusOK:
		shape, known := rpcReplies[[2]uint32{program, procedure}]
		if !known {
			return false
		}
		for _, part := range shape {
			switch part {
			case 's':
				p.str()
			case 'u':
				p.take(16)
			case 'i':
				p.u32()
			case 'a':
				p.take(4 * int64(p.u32()))
			}
		}
		return p.ok && len(p.b) == 0
	}
	return false
}

// monitorEvent decodes qemu_domain_monitor_event_msg.
func monitorEvent(p xdrReader) (domain string, e Event, err error) {
	p.u32() // callback
	domain = p.str()
	p.take(16) // UUID
	p.u32()    // id
	e.Name = p.str()
	seconds := int64(uint64(p.u32())<<32 | uint64(p.u32()))
	micros := p.u32()
	e.Time = time.Unix(seconds, 0).Add(time.Duration(micros) * time.Microsecond)
	if p.u32() == 1 {
		e.Data = json.RawMessage(p.str())
	}
	if !p.ok || len(p.b) > 0 || e.Data != nil && !json.Valid(e.Data) {
		return "", Event{}, errors.New("libvirt sends a malformed event")
	}
	return domain, e, nil
}

// xdrReader takes values off a payload (RFC 4506). ok turns false at the first that is not there, and stays so.
type xdrReader struct {
	b  []byte
	ok bool
}

func (x *xdrReader) take(n int64) []byte {
	if !x.ok || n < 0 || n > int64(len(x.b)) {
		x.ok = false
		return nil
	}
	b := x.b[:n]
	x.b = x.b[n:]
	return b
}

func (x *xdrReader) u32() uint32 {
	b := x.take(4)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// str is a length, as many bytes, and padding to a multiple of four.
func (x *xdrReader) str() string {
	n := int64(x.u32())
	s := x.take(n)
	x.take((4 - n%4) % 4)
	return string(s)
}
