package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
)

// rpcMessage builds a message of libvirt's; its parts are numbers, and strings with length and padding.
func rpcMessage(program, procedure, kind, serial, status uint32, parts ...any) []byte {
	b := make([]byte, rpcLengthBytes)
	put := func(v uint32) { b = binary.BigEndian.AppendUint32(b, v) }
	for _, v := range []uint32{program, 1, procedure, kind, serial, status} {
		put(v)
	}
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			put(uint32(p))
		case string:
			put(uint32(len(p)))
			b = append(b, p...)
			b = append(b, make([]byte, (4-len(p)%4)%4)...)
		case []byte:
			b = append(b, p...)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestRPCGuard(t *testing.T) {
	uuid := make([]byte, 16)
	answer := func(serial uint32) []byte {
		return rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, serial, rpcStatusOK, `{"return": {}}`)
	}
	stop := rpcMessage(rpcProgramQEMU, rpcQEMUMonitorEvent, rpcTypeMessage, 0, rpcStatusOK,
		7, "vm", uuid, 1, "STOP", 0, 1795391664, 868864, 0)
	detailed := rpcMessage(rpcProgramQEMU, rpcQEMUMonitorEvent, rpcTypeMessage, 0, rpcStatusOK,
		7, "vm", uuid, 1, "JOB", 0, 1, 2, 1, `{"id": 5}`)
	keepAlive := rpcMessage(0x6b656570, 1, rpcTypeMessage, 0, rpcStatusOK)
	join := func(msgs ...[]byte) []byte { return bytes.Join(msgs, nil) }

	for name, c := range map[string]struct {
		said   []byte
		passed []byte
		events string
		want   string
	}{
		"a reply":               {answer(1), answer(1), "", "EOF"},
		"out of order":          {join(answer(2), answer(1)), join(answer(2), answer(1)), "", "EOF"},
		"events":                {join(stop, answer(1), detailed), answer(1), "vm STOP 1795391664868864 ;vm JOB 1000002 {\"id\": 5};", "EOF"},
		"keep-alive":            {join(keepAlive, answer(1)), answer(1), "", "EOF"},
		"twice the same":        {join(answer(1), answer(1)), answer(1), "", "call 1, which nobody waits for"},
		"a call never made":     {answer(9), nil, "", "call 9, which nobody waits for"},
		"an error":              {rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusError, 1, 2, 1, "no", 2), rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusError, 1, 2, 1, "no", 2), "", "EOF"},
		"an error unsaid":       {rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusError, 1, 2, 0, 2), nil, "", "malformed"},
		"shorter than a header": {[]byte{0, 0, 0, 4}, nil, "", "message of 4 bytes"},
		"huge":                  {[]byte{0x7f, 0, 0, 0}, nil, "", "message of 2130706432 bytes"},
		"a string too long":     {rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusOK, 0x7fffffff), nil, "", "malformed"},
		"something behind":      {rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusOK, "x", 1), nil, "", "malformed"},
		"an array too long":     {rpcMessage(rpcProgramRemote, 66, rpcTypeReply, 1, rpcStatusOK, 0x7fffffff), nil, "", "malformed"},
		"an unknown procedure":  {rpcMessage(rpcProgramRemote, 300, rpcTypeReply, 1, rpcStatusOK), nil, "", "malformed"},
		"cut":                   {answer(1)[:20], nil, "", "unexpected EOF"},
		"an event cut":          {rpcMessage(rpcProgramQEMU, rpcQEMUMonitorEvent, rpcTypeMessage, 0, 0, 7, "vm"), nil, "", "malformed event"},
		"an event of no JSON": {rpcMessage(rpcProgramQEMU, rpcQEMUMonitorEvent, rpcTypeMessage, 0, 0, 7, "vm", uuid, 1, "X", 0, 1, 2, 1, "}"),
			nil, "", "malformed event"},
	} {
		t.Run(name, func(t *testing.T) {
			var events strings.Builder
			var ended error
			g := &rpcGuard{
				Conn:  replay{r: iotest.OneByteReader(bytes.NewReader(c.said))},
				calls: make(map[uint32]bool),
				ended: func(err error) { ended = err },
				event: func(domain string, e Event) {
					events.WriteString(strings.Join([]string{domain, e.Name, strconv.FormatInt(e.Time.UnixMicro(), 10), string(e.Data)}, " ") + ";")
				},
			}
			// Two calls go out, in pieces of all sizes.
			calls := join(rpcMessage(rpcProgramQEMU, 1, 0, 1, 0, "abcde"), rpcMessage(rpcProgramQEMU, 1, 0, 2, 0))
			for i, n := 0, 1; i < len(calls); i, n = i+n, n+1 {
				g.Write(calls[i:min(len(calls), i+n)])
			}
			passed, err := io.ReadAll(g)
			if err != nil || !bytes.Equal(passed, c.passed) && len(c.passed)+len(passed) > 0 {
				t.Errorf("passed on %q, %v; want %q", passed, err, c.passed)
			}
			if events.String() != c.events {
				t.Errorf("events %q, want %q", &events, c.events)
			}
			if ended == nil || !strings.Contains(ended.Error(), c.want) || c.want == "EOF" && !errors.Is(ended, io.EOF) {
				t.Errorf("ended with %v, want %q", ended, c.want)
			}
		})
	}
}

func FuzzRPCGuard(f *testing.F) {
	f.Add(rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusOK, `{"return": {}}`))
	f.Add(rpcMessage(rpcProgramRemote, 23, rpcTypeReply, 1, rpcStatusOK, "vm", make([]byte, 16), 1))
	f.Add(rpcMessage(rpcProgramQEMU, 1, rpcTypeReply, 1, rpcStatusError, 1, 2, 1, "no", 2))
	f.Add(rpcMessage(rpcProgramQEMU, rpcQEMUMonitorEvent, rpcTypeMessage, 0, 0, 7, "vm", make([]byte, 16), 1, "X", 0, 1, 2, 1, "{}"))
	f.Fuzz(func(t *testing.T, said []byte) {
		g := &rpcGuard{
			Conn:  replay{r: bytes.NewReader(said)},
			calls: map[uint32]bool{1: true, 2: true},
			ended: func(error) {},
			event: func(string, Event) {},
		}
		passed, err := io.ReadAll(g)
		if err != nil || len(passed) > len(said) {
			t.Fatalf("passed on %d bytes of %d: %v", len(passed), len(said), err)
		}
		for n := 0; len(passed) > 0; n++ {
			length := binary.BigEndian.Uint32(passed)
			if n == 2 || length < rpcHeaderBytes || int(length) > len(passed) {
				t.Fatalf("message %d of %d bytes passed on, %d there", n, length, len(passed))
			}
			passed = passed[length:]
		}
	})
}
