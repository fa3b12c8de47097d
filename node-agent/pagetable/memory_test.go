package pagetable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

func TestMemoryScatter(t *testing.T) {
	c := startChild(t)
	m := c.memory()
	start := c.Addresses[shared]
	random := rand.New(rand.NewPCG(3, 4))
	whole := make([]byte, regionBytes)
	for i := 0; i < len(whole); i += 8 {
		binary.NativeEndian.PutUint64(whole[i:], random.Uint64())
	}
	if err := m.Write(whole, start); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, regionBytes)
	if err := m.Read(got, start); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(whole, got) {
		t.Fatal("read differs from what was written")
	}

	// More segments than one call takes, of all lengths, empty ones too, in no order.
	var segments []Segment
	var want []byte
	for range 3*segmentsAtOnce + 7 {
		offset, n := random.Uint64N(regionBytes-3*pageBytes), random.Uint64N(3*pageBytes)
		if random.IntN(10) == 0 {
			n = 0
		}
		segments = append(segments, Segment{Address: start + offset, Bytes: n})
		want = append(want, whole[offset:offset+n]...)
	}
	got = make([]byte, len(want))
	if err := m.ReadScatter(got, segments); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) {
		t.Error("scattered read differs")
	}

	// Every other page, written scattered.
	segments = segments[:0]
	for _, page := range pagesOf(0, regionPages, 2) {
		segments = append(segments, Segment{Address: start + page*pageBytes, Bytes: pageBytes})
		clear(whole[page*pageBytes:][:pageBytes])
	}
	if err := m.WriteScatter(make([]byte, len(segments)*pageBytes), segments); err != nil {
		t.Fatal(err)
	}
	got = make([]byte, regionBytes)
	if err := m.Read(got, start); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(whole, got) {
		t.Error("scattered write differs")
	}
}

func TestMemoryErrors(t *testing.T) {
	c := startChild(t)
	m := c.memory()
	start := c.Addresses[small]
	end := start + regionBytes // nothing may be touched behind it
	protected := c.Addresses[readOnly]
	buffer := make([]byte, 4*pageBytes)
	cases := []struct {
		name  string
		do    func() error
		at    uint64
		write bool
	}{
		{"run past the end", func() error { return m.Read(buffer, end-2*pageBytes) }, end, false},
		{"segment past the end", func() error {
			return m.ReadScatter(buffer, []Segment{{start, pageBytes}, {end - pageBytes, 2 * pageBytes}, {start, pageBytes}})
		}, end, false},
		{"segment nowhere, behind empty ones", func() error {
			return m.ReadScatter(buffer[:2*pageBytes], []Segment{{start, pageBytes}, {start, 0}, {0x1000, 0}, {0x1000, pageBytes}})
		}, 0x1000, false},
		{"scattered write onto a read-only page", func() error {
			return m.WriteScatter(buffer[:2*pageBytes], []Segment{{start, pageBytes}, {protected, pageBytes}})
		}, protected, true},
		{"write nowhere", func() error { return m.Write(buffer, 0x1000) }, 0x1000, true},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.do()
			var fault *FaultError
			if !errors.As(err, &fault) {
				t.Fatalf("got %v, want a fault", err)
			}
			if fault.PID != c.pid || fault.Address != tc.at || fault.Write != tc.write || fault.Err == nil {
				t.Errorf("got %+v, want address %#x", fault, tc.at)
			}
		})
	}
	if err := m.ReadScatter(buffer, []Segment{{start, pageBytes}}); err == nil {
		t.Error("a buffer longer than its segments was taken")
	}
	if err := m.Write([]byte{7}, protected); err != nil {
		t.Errorf("write onto a read-only private page: %v", err)
	}
	var b [1]byte
	if err := m.Read(b[:], protected); err != nil || b[0] != 7 {
		t.Errorf("read %d back: %v", b[0], err)
	}
}
