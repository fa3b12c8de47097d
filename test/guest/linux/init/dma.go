package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"golang.org/x/sys/unix"
)

const (
	dmaBuffers     = 64
	dmaBufferBytes = 64 << 10
	reportInterval = time.Second
)

// startDMA reads the disk past the page cache, so that the device writes straight into the load's own pages; compares what
// came with what each sector must hold; and spoils the buffer before it is used again. Now and then it writes what it read
// back to its place.
func startDMA(g *guest) (func() error, error) {
	disk, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	bytesOfDisk, err := disk.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	pool, err := memory(dmaBuffers * dmaBufferBytes)
	if err != nil {
		return nil, err
	}
	return func() error {
		random := rand.New(rand.NewPCG(1, 1))
		want := make([]byte, workload.SectorBytes)
		report := time.Now()
		for reads := 1; ; reads++ {
			place := random.Uint64N(uint64(bytesOfDisk)/dmaBufferBytes) * dmaBufferBytes
			b := pool[reads%dmaBuffers*dmaBufferBytes:][:dmaBufferBytes]
			if _, err := disk.ReadAt(b, int64(place)); err != nil {
				return fmt.Errorf("read %d bytes at %d: %w", len(b), place, err)
			}
			for off := 0; off < len(b); off += workload.SectorBytes {
				workload.Sector(want, (place+uint64(off))/workload.SectorBytes)
				if !bytes.Equal(b[off:off+workload.SectorBytes], want) {
					g.printf("CORRUPT dma: sector %d, in read %d", (place+uint64(off))/workload.SectorBytes, reads)
					break
				}
			}
			if reads%16 == 0 {
				if _, err := disk.WriteAt(b, int64(place)); err != nil {
					return fmt.Errorf("write %d bytes at %d: %w", len(b), place, err)
				}
			}
			// The next read into this buffer must change all of it.
			for off := 0; off < len(b); off += 256 {
				b[off] = ^b[off]
			}
			if time.Since(report) >= reportInterval {
				g.printf("dma: %d reads ok", reads)
				report = time.Now()
			}
		}
	}, nil
}
