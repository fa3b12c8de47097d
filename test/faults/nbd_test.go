package faults

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nbdDisk is a disk whose flushes take as long as the test says: QEMU reaches it over NBD, on a socket in a directory of the test's. Its
// content is zeros, whatever is written.
type nbdDisk struct {
	socket  string
	flush   atomic.Int64 // ns that a flush takes
	flushes atomic.Int64 // that came
}

// nbdBytes is its size.
const nbdBytes = 1 << 20

// What of NBD is needed (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md): the fixed newstyle handshake with
// NBD_OPT_GO, and simple replies.
const (
	nbdMagic         = 0x4e42444d41474943
	nbdOptionMagic   = 0x49484156454f5054
	nbdReplyMagic    = 0x3e889045565a9
	nbdRequestMagic  = 0x25609513
	nbdSimpleMagic   = 0x67446698
	nbdFixedNewstyle = 1 << 0
	nbdNoZeroes      = 1 << 1

	nbdOptionAbort = 2
	nbdOptionGo    = 7

	nbdReplyAck         = 1
	nbdReplyInfo        = 3
	nbdReplyUnsupported = 1<<31 | 1

	nbdHasFlags  = 1 << 0
	nbdSendFlush = 1 << 2

	nbdRead       = 0
	nbdDisconnect = 2
	nbdFlush      = 3
)

func newNBDDisk(t *testing.T) *nbdDisk {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmckpt-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &nbdDisk{socket: filepath.Join(dir, "nbd")}
	listener, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if err := d.serve(conn); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
					t.Logf("the disk's server: %v", err)
				}
			}()
		}
	}()
	return d
}

// arguments attach the disk to a machine, so that others can write to it as well.
func (d *nbdDisk) arguments() []string {
	return []string{
		"-blockdev", "driver=nbd,node-name=slow,server.type=unix,server.path=" + d.socket,
		"-device", "virtio-blk-pci-non-transitional,id=slow-disk,drive=slow,share-rw=on,bus=pcie.0,addr=0x1c",
	}
}

func (d *nbdDisk) serve(conn net.Conn) error {
	read := func(values ...any) error {
		for _, v := range values {
			if err := binary.Read(conn, binary.BigEndian, v); err != nil {
				return err
			}
		}
		return nil
	}
	write := func(values ...any) error {
		var b bytes.Buffer
		for _, v := range values {
			if err := binary.Write(&b, binary.BigEndian, v); err != nil {
				return err
			}
		}
		_, err := conn.Write(b.Bytes())
		return err
	}
	var flags uint32
	if err := errors.Join(write(uint64(nbdMagic), uint64(nbdOptionMagic), uint16(nbdFixedNewstyle|nbdNoZeroes)), read(&flags)); err != nil {
		return err
	}
	for chosen := false; !chosen; {
		var magic uint64
		var option, length uint32
		if err := read(&magic, &option, &length); err != nil {
			return err
		}
		if magic != nbdOptionMagic || length > 1<<16 {
			return fmt.Errorf("option %d: magic %#x, %d bytes", option, magic, length)
		}
		if err := read(make([]byte, length)); err != nil {
			return err
		}
		reply := func(kind uint32, data ...byte) error {
			return write(uint64(nbdReplyMagic), option, kind, uint32(len(data)), data)
		}
		var err error
		switch option {
		case nbdOptionGo:
			// NBD_INFO_EXPORT is 0; size and flags of the export follow.
			info := binary.BigEndian.AppendUint64([]byte{0, 0}, nbdBytes)
			info = binary.BigEndian.AppendUint16(info, nbdHasFlags|nbdSendFlush)
			err = errors.Join(reply(nbdReplyInfo, info...), reply(nbdReplyAck))
			chosen = true
		case nbdOptionAbort:
			return reply(nbdReplyAck)
		default:
			err = reply(nbdReplyUnsupported)
		}
		if err != nil {
			return err
		}
	}
	for {
		var request struct {
			Magic  uint32
			Flags  uint16
			Kind   uint16
			Cookie uint64
			Offset uint64
			Bytes  uint32
		}
		if err := read(&request); err != nil {
			return err
		}
		if request.Magic != nbdRequestMagic || request.Bytes > nbdBytes {
			return fmt.Errorf("request %+v", request)
		}
		var answer []byte
		switch request.Kind {
		case nbdRead:
			answer = make([]byte, request.Bytes)
		case nbdDisconnect:
			return nil
		case nbdFlush:
			d.flushes.Add(1)
			time.Sleep(time.Duration(d.flush.Load()))
		default:
			if err := read(make([]byte, request.Bytes)); err != nil { // a write
				return err
			}
		}
		if err := write(uint32(nbdSimpleMagic), uint32(0), request.Cookie, answer); err != nil {
			return err
		}
	}
}
