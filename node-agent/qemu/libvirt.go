package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/digitalocean/go-libvirt"
)

// libvirtMonitor sends QMP through libvirt, which holds the QEMU's own monitor. A round trip takes 1.5 to 5 ms. libvirt
// works on one command of a domain at a time, its own and those of its other clients included.
type libvirtMonitor struct {
	conn   net.Conn
	rpc    *libvirt.Libvirt
	domain libvirt.Domain
	hub    eventHub

	once sync.Once
	done chan struct{} // closed when err is set
	err  error
}

// libvirtURIs are tried in turn: a privileged libvirt serves the first, an unprivileged one (such as virt-launcher's) the
// second.
var libvirtURIs = []libvirt.ConnectURI{libvirt.QEMUSystem, libvirt.QEMUSession}

// DialLibvirt connects to the libvirt that listens on the unix socket path of this machine, for the domain of that name.
func DialLibvirt(ctx context.Context, path, domain string) (Monitor, error) {
	var errs dialErrors
	for _, uri := range libvirtURIs {
		m, err := dialLibvirt(ctx, path, uri, domain)
		if err == nil {
			return m, nil
		}
		var network *net.OpError
		if errors.As(err, &network) && network.Op == "dial" { // it does not come to the URI
			return nil, fmt.Errorf("libvirt socket %s: %w", path, network.Err)
		}
		errs = append(errs, fmt.Errorf("libvirt socket %s, %s: %w", path, uri, err))
		if libvirt.IsNotFound(err) || ctx.Err() != nil {
			break
		}
	}
	return nil, errs
}

// connected is a connection as the dialer that the library wants.
type connected struct{ net.Conn }

func (c connected) Dial() (net.Conn, error) { return c.Conn, nil }

func dialLibvirt(ctx context.Context, path string, uri libvirt.ConnectURI, domain string) (_ *libvirtMonitor, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	m := &libvirtMonitor{conn: conn, done: make(chan struct{})}
	m.rpc = libvirt.NewWithDialer(connected{&rpcGuard{
		Conn:  conn,
		calls: make(map[uint32]bool),
		ended: func(err error) { m.fail(fmt.Errorf("read from libvirt: %w", err)) },
		event: func(name string, e Event) {
			if name == domain {
				m.hub.publish(e)
			}
		},
	}})
	// The library knows no contexts: until the connection stands, closing it is what stops the waiting.
	stop := context.AfterFunc(ctx, func() { m.fail(ctx.Err()) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			m.fail(err)
		}
	}()
	if err := m.rpc.ConnectToURI(uri); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	if m.domain, err = m.rpc.DomainLookupByName(domain); err != nil {
		return nil, fmt.Errorf("look up domain %q: %w", domain, err)
	}
	if _, err := m.rpc.QEMUConnectDomainMonitorEventRegister(libvirt.OptDomain{m.domain}, nil, 0); err != nil {
		return nil, fmt.Errorf("ask for the events of domain %q: %w", domain, err)
	}
	return m, nil
}

func (m *libvirtMonitor) Execute(ctx context.Context, command string, args, result any) error {
	line, err := json.Marshal(qmpRequest{Execute: command, Arguments: args}) // libvirt adds an id of its own
	if err != nil {
		return fmt.Errorf("encode the arguments of %s: %w", command, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("send %s: %w", command, err)
	}
	type reply struct {
		text string
		err  error
	}
	answer := make(chan reply, 1)
	go func() {
		text, err := m.rpc.QEMUDomainMonitorCommand(m.domain, string(line), 0)
		answer <- reply{text, err}
	}()
	select {
	case r := <-answer:
		if errors.Is(r.err, libvirt.ErrInterrupted) {
			<-m.done
			return fmt.Errorf("wait for the answer to %s: %w", command, m.err)
		}
		if r.err != nil {
			return fmt.Errorf("%s through libvirt: %w", command, r.err)
		}
		var msg qmpMessage
		if err := json.Unmarshal([]byte(r.text), &msg); err != nil {
			return fmt.Errorf("%s: decode the answer: %w", command, err)
		}
		return msg.answer(command, result)
	case <-ctx.Done():
		return fmt.Errorf("wait for the answer to %s: %w", command, ctx.Err())
	case <-m.done:
		return fmt.Errorf("wait for the answer to %s: %w", command, m.err)
	}
}

func (m *libvirtMonitor) Subscribe(events ...string) *Subscription { return m.hub.subscribe(events) }

func (m *libvirtMonitor) Close() error {
	m.fail(ErrMonitorClosed)
	return nil
}

// fail ends the connection for the first reason given. The library's own way of disconnecting waits for a reply.
func (m *libvirtMonitor) fail(err error) {
	m.once.Do(func() {
		m.err = err
		close(m.done)
		m.conn.Close()
		m.hub.end(err)
	})
}
