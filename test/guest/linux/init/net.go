package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// QEMU's user network answers echo requests to its gateway by itself, so nothing leaves the process.
const (
	netInterface = "eth0"
	echoBytes    = 1400
	echoHeader   = 8 // ICMP: type, code, checksum, identifier, sequence number
	ipHeader     = 20
	echoTimeout  = 500 * time.Millisecond
)

// startNet sends echo requests to the network card and compares what comes back: what arrives is written to memory by
// the device.
func startNet(g *guest) (func() error, error) {
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(control)
	request, err := unix.NewIfreq(netInterface)
	if err != nil {
		return nil, err
	}
	for _, set := range []struct {
		ioctl uint
		ip    []byte
	}{
		{unix.SIOCSIFADDR, []byte{10, 0, 2, 15}},
		{unix.SIOCSIFNETMASK, []byte{255, 255, 255, 0}},
	} {
		if err := request.SetInet4Addr(set.ip); err != nil {
			return nil, err
		}
		if err := unix.IoctlIfreq(control, set.ioctl, request); err != nil {
			return nil, fmt.Errorf("address of %s: %w", netInterface, err)
		}
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(control, unix.SIOCSIFFLAGS, request); err != nil {
		return nil, fmt.Errorf("bring up %s: %w", netInterface, err)
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, err
	}
	timeout := unix.NsecToTimeval(int64(echoTimeout))
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	return func() error { return g.echo(s, [4]byte{10, 0, 2, 2}) }, nil
}

func (g *guest) echo(s int, gateway [4]byte) error {
	random := rand.NewChaCha8([32]byte{1})
	request := make([]byte, echoHeader+echoBytes)
	answer := make([]byte, 2048)
	var echoes, lost uint64
	report := time.Now()
	for sequence := uint16(1); ; sequence++ {
		random.Read(request[echoHeader:])
		request[0], request[1] = 8, 0
		binary.BigEndian.PutUint16(request[2:], 0)
		binary.BigEndian.PutUint16(request[4:], 1)
		binary.BigEndian.PutUint16(request[6:], sequence)
		binary.BigEndian.PutUint16(request[2:], internetChecksum(request))
		if err := unix.Sendto(s, request, 0, &unix.SockaddrInet4{Addr: gateway}); err != nil {
			lost++
			time.Sleep(echoTimeout)
			continue
		}
		for {
			n, _, err := unix.Recvfrom(s, answer, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				lost++
				break
			}
			if n != ipHeader+len(request) || binary.BigEndian.Uint16(answer[ipHeader+6:]) != sequence {
				continue // an answer that came too late
			}
			if !bytes.Equal(answer[ipHeader+echoHeader:n], request[echoHeader:]) {
				g.printf("CORRUPT net: the answer to echo request %d differs from it", sequence)
			}
			echoes++
			break
		}
		if time.Since(report) >= reportInterval {
			g.printf("net: %d echoes ok, %d lost", echoes, lost)
			report = time.Now()
		}
	}
}

// internetChecksum is RFC 1071's.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
