package main

import (
	"encoding/binary"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pageBytes = 4096
	// allocMaxBytes bounds one allocation, allocHeld how many are held at once.
	allocMaxBytes = 16 << 20
	allocHeld     = 4
)

// startAlloc takes memory from the kernel, fills it, checks it a while later and gives it back, so that the balloon and
// free page reporting have pages to give up and to take again.
func startAlloc(g *guest) (func() error, error) {
	return func() error {
		random := rand.New(rand.NewPCG(2, 2))
		var held [allocHeld][]byte
		report := time.Now()
		for n := uint64(1); ; n++ {
			slot := n % allocHeld
			if b := held[slot]; b != nil {
				for off := uint64(0); off < uint64(len(b)); off += pageBytes {
					if got, want := binary.LittleEndian.Uint64(b[off:]), off^(n-allocHeld); got != want {
						g.printf("CORRUPT alloc: word %#x in place of %#x", got, want)
						break
					}
				}
				if err := unix.Munmap(b); err != nil {
					return err
				}
			}
			b, err := memory((1 + random.Uint64N(allocMaxBytes/pageBytes)) * pageBytes)
			if err != nil {
				return err
			}
			for off := uint64(0); off < uint64(len(b)); off += pageBytes {
				binary.LittleEndian.PutUint64(b[off:], off^n)
			}
			held[slot] = b
			if time.Since(report) >= reportInterval {
				g.printf("alloc: %d allocations ok", n)
				report = time.Now()
			}
			time.Sleep(time.Duration(random.IntN(50)) * time.Millisecond)
		}
	}, nil
}

// startStress writes at random all over a share of the memory. Each page that was ever written begins with a word and its
// seal, which depends on the page; both are checked before the page is written again.
func startStress(g *guest) (func() error, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	pages := info.Totalram * uint64(info.Unit) / 100 * g.number("stress", 25) / pageBytes
	b, err := memory(pages * pageBytes)
	if err != nil {
		return nil, err
	}
	return func() error {
		random := rand.New(rand.NewPCG(3, 3))
		report := time.Now()
		for writes := uint64(1); ; writes++ {
			page := random.Uint64N(pages)
			p := b[page*pageBytes:][:pageBytes]
			word, seal := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
			if (word != 0 || seal != 0) && seal != ^(word^page) {
				g.printf("CORRUPT stress: page %d holds %#x sealed with %#x", page, word, seal)
			}
			word = random.Uint64() | 1
			binary.LittleEndian.PutUint64(p, word)
			binary.LittleEndian.PutUint64(p[8:], ^(word ^ page))
			binary.LittleEndian.PutUint64(p[16+8*random.IntN(510):], word)
			if writes%64 == 0 && time.Since(report) >= reportInterval {
				g.printf("stress: %d writes ok", writes)
				report = time.Now()
			}
		}
	}, nil
}
