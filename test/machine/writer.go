package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/test/guest/writer"
)

// Writer is the bare-metal guest that writes memory by vCPU and by device DMA. It runs under every accelerator and is up
// in a tenth of a second.
type Writer struct {
	// Parameters say what it writes. Ranges left empty are laid out over the machine's memory; see Percent.
	writer.Parameters

	// Percent of the memory that is written, from its beginning; default 100. Where DMAPagesPerPass is set, the last
	// eighth of that in low memory is for DMA.
	Percent uint64
}

// lowMemoryBytes is how much of the memory a q35 machine has below 4 GiB (QEMU, hw/i386/pc_q35.c).
func lowMemoryBytes(memory uint64) uint64 {
	if memory >= 0xb0000000 {
		return 0x80000000
	}
	return memory
}

// layout fills in the ranges that were left empty.
func (w Writer) layout(memory uint64) writer.Parameters {
	p := w.Parameters
	low := lowMemoryBytes(memory)
	if p.Low.Pages == 0 && p.High.Pages == 0 {
		written := memory * orDefault(w.Percent, 100) / 100 / pageset.PageBytes * pageset.PageBytes
		p.Low = writer.Range{GPA: writer.FirstGPA, Pages: (max(min(written, low), writer.FirstGPA) - writer.FirstGPA) / pageset.PageBytes}
		if written > low {
			p.High = writer.Range{GPA: 4 * GiB, Pages: (written - low) / pageset.PageBytes}
		}
		if p.DMAPagesPerPass > 0 && p.DMA.Pages == 0 {
			p.DMA.Pages = p.Low.Pages / 8
			p.Low.Pages -= p.DMA.Pages
			p.DMA.GPA = p.Low.GPA + p.Low.Pages*pageset.PageBytes
		}
	}
	p.PagesPerPass = orDefault(p.PagesPerPass, 1024)
	p.Seed = orDefault(p.Seed, 1)
	for _, r := range []writer.Range{p.Low, p.High, p.DMA} {
		p.MapGiB = max(p.MapGiB, (r.GPA+r.Pages*pageset.PageBytes+GiB-1)/GiB)
	}
	return p
}

func (w Writer) prepare(p *preparation) ([]string, error) {
	rom, err := writer.ROM(p.ctx, p.cache, w.layout(p.options.MemoryBytes))
	if err != nil {
		return nil, err
	}
	bios := filepath.Join(p.dir, "writer.rom")
	if err := os.WriteFile(bios, rom, 0o644); err != nil {
		return nil, err
	}
	item := filepath.Join(p.dir, "writer.item")
	if err := os.WriteFile(item, writer.Item(1), 0o644); err != nil {
		return nil, err
	}
	return []string{"-bios", bios, "-fw_cfg", "name=" + writer.ItemName + ",file=" + item}, nil
}

// WriterParameters returns what the bare-metal guest was started with, its ranges filled in.
func (m *Machine) WriterParameters() writer.Parameters {
	w, _ := m.options.Guest.(Writer)
	return w.layout(m.options.MemoryBytes)
}

// SetWriterParameters changes what the bare-metal guest does from its next pass on, by writing to its memory. MapGiB,
// Seed and DMA.Pages of 0 or more than 0 are read once, at the start.
func (m *Machine) SetWriterParameters(ctx context.Context, p writer.Parameters) error {
	return m.WriteGuest(ctx, writer.ParametersGPA, p.Bytes())
}

// WriterStatus returns the bare-metal guest's account of its work, and false while it has not begun.
func (m *Machine) WriterStatus(ctx context.Context) (writer.Status, bool, error) {
	b := make([]byte, writer.StatusBytes)
	if err := m.ReadGuest(ctx, writer.StatusGPA, b); err != nil {
		return writer.Status{}, false, err
	}
	s, begun := writer.ParseStatus(b)
	return s, begun, nil
}

// WaitWriter waits until the bare-metal guest's account satisfies enough: for example that it made n more passes.
func (m *Machine) WaitWriter(ctx context.Context, enough func(writer.Status) bool) (writer.Status, error) {
	for {
		s, begun, err := m.WriterStatus(ctx)
		if err != nil {
			return s, err
		}
		if begun && enough(s) {
			return s, nil
		}
		if err := m.pollAgain(ctx); err != nil {
			return s, fmt.Errorf("wait for the bare-metal guest (now %+v): %w", s, err)
		}
	}
}
