package workload

import (
	"errors"
	"testing"
)

// TestCounter: the buffer that was stepped from 0 is the one that each count says, and its hash is known without it.
func TestCounter(t *testing.T) {
	for _, c := range []Counter{
		{Pages: 12, GroupPages: 4, Seed: 1},
		{Pages: 12, GroupPages: 12, Seed: 1},
		{Pages: 7, GroupPages: 1, Seed: 2},
	} {
		buffer := make([]byte, c.Pages*PageBytes)
		c.Fill(buffer)
		seen := map[uint64]uint64{}
		for count := range uint64(40) {
			if count > 0 {
				c.Step(buffer, count)
			}
			hash, err := c.Check(buffer, count)
			if err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
			if want := c.Hash(count); hash != want {
				t.Fatalf("%+v count %d: hash %x, without the buffer %x", c, count, hash, want)
			}
			if before, again := seen[hash]; again {
				t.Fatalf("%+v: counts %d and %d have the same hash", c, before, count)
			}
			seen[hash] = count
		}
	}
}

// TestCounterNoticesOldPages: a page from the count before, as a lost write would leave it, is found and named.
func TestCounterNoticesOldPages(t *testing.T) {
	c := Counter{Pages: 6, GroupPages: 2, Seed: 1}
	buffer := make([]byte, c.Pages*PageBytes)
	c.Fill(buffer)
	old := append([]byte(nil), buffer[2*PageBytes:3*PageBytes]...)
	c.Step(buffer, 1) // group 1: pages 2 and 3
	copy(buffer[2*PageBytes:], old)
	_, err := c.Check(buffer, 1)
	var corrupt *CorruptError
	if !errors.As(err, &corrupt) || corrupt.Page != 2 || corrupt.Off != 0 {
		t.Fatalf("error %v, want page 2 named", err)
	}
}

func TestParseState(t *testing.T) {
	for _, s := range []State{{Count: 1, Hash: 0xabc, OK: true}, {Count: 12345, Hash: 1 << 63}} {
		got, ok := ParseState(s.String())
		if !ok || got != s {
			t.Errorf("%q reads as %+v, %v", s, got, ok)
		}
	}
	for _, line := range []string{"", "count=1", "init: ready", "count=1 hash=12 maybe"} {
		if s, ok := ParseState(line); ok {
			t.Errorf("%q reads as %+v", line, s)
		}
	}
}
