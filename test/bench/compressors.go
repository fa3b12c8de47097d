package main

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
)

// alone measures how fast a compressor is by itself: on all processors, in frames of 64 KiB as images have them, nothing read or written. No
// base can be faster than that.
func alone(how image.Compression, c content, rate *cell) error {
	const frame = 64 << 10
	const bytes = 1 << 30
	workers := runtime.GOMAXPROCS(0)
	compress := make([]func([]byte), workers)
	for i := range workers {
		out := make([]byte, 0, s2.MaxEncodedLen(frame))
		switch how {
		case image.S2:
			compress[i] = func(raw []byte) { s2.Encode(out[:cap(out)], raw) }
		case image.Zstd:
			z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
				zstd.WithWindowSize(frame), zstd.WithEncoderCRC(false))
			if err != nil {
				return err
			}
			defer z.Close()
			compress[i] = func(raw []byte) { z.EncodeAll(raw, out[:0]) }
		default:
			return fmt.Errorf("%v is no compressor", how)
		}
	}
	begin := time.Now()
	var group sync.WaitGroup
	for _, f := range compress {
		group.Go(func() {
			for done := 0; done < bytes/workers; {
				for raw := range slices.Chunk([]byte(c), frame) {
					f(raw)
					if done += len(raw); done >= bytes/workers {
						break
					}
				}
			}
		})
	}
	group.Wait()
	rate.add(bytes / 1e6 / time.Since(begin).Seconds())
	return nil
}

// warm touches the memory that the machines will have once, and gives it back. On a virtual machine, memory that was never used has yet to come from its host, at a
// fraction of the speed: whichever machine is started first would pay for it.
func warm() error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("ask for free memory: %w", err)
	}
	bytes := int(min(8<<30, uint64(info.Freeram)*uint64(info.Unit)/2))
	p, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("touch %d GiB of memory: %w", bytes>>30, err)
	}
	return unix.Munmap(p)
}
