package writer

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed writer.S
var source []byte

//go:embed writer.ld
var script []byte

// Where things are in the guest's memory, and the parameters in the ROM; writer.S has the same numbers.
const (
	ParametersGPA = 0x6000
	StatusGPA     = 0x7000
	StatusBytes   = 0x58

	// FirstGPA is the lowest address that ranges may begin at: below it are the guest's code, its page tables, and what
	// a PC keeps there.
	FirstGPA = 0x200000

	romBytes         = 64 << 10
	romParametersOff = 0xe000
	magic            = "VMCKPTWR"
)

// ItemName is the name of the fw_cfg item (QEMU: -fw_cfg name=…,file=…) that DMA reads from, and ItemBytes its size.
const (
	ItemName  = "opt/org.vmckpt/writer"
	ItemBytes = 64 << 10
)

// Range is a range of guest-physical memory, in pages of 4096 bytes.
type Range struct {
	GPA   uint64
	Pages uint64
}

// Parameters say what the guest writes. It works in passes: PagesPerPass pages by vCPU, then DMAPagesPerPass by DMA,
// then Spin turns of an empty loop.
type Parameters struct {
	// Low and High are the memory that the vCPU writes, taken as one; either may be empty.
	Low, High Range
	// PagesPerPass is how many of its pages are written in one pass, in order or in random order.
	PagesPerPass uint64
	Random       bool
	// Whole writes every word of a page, else the first two alone. With Uniform the page gets one repeated word.
	Whole   bool
	Uniform bool
	Spin    uint64
	Seed    uint64

	// Clock has the guest read its clock after every page and in every turn of the empty loop, and keep how long it was not read at the
	// most: what a guest notices of being stopped. Where Epoch changes, that is measured anew.
	Clock bool
	Epoch uint64

	// DMA is the memory that the fw_cfg device writes, at random pages. It must not overlap Low and High.
	DMA             Range
	DMAPagesPerPass uint64

	// MapGiB is how much memory is mapped, from address 0: all ranges must lie within. Mapping 1 GiB takes a few
	// milliseconds.
	MapGiB uint64
}

const (
	flagRandom  = 1
	flagWhole   = 2
	flagUniform = 4
	flagClock   = 8
)

// Bytes returns the parameters as they lie in memory at ParametersGPA.
func (p Parameters) Bytes() []byte {
	var flags uint64
	for flag, on := range map[uint64]bool{flagRandom: p.Random, flagWhole: p.Whole, flagUniform: p.Uniform, flagClock: p.Clock} {
		if on {
			flags |= flag
		}
	}
	b := []byte(magic)
	for _, v := range []uint64{
		p.Low.GPA, p.Low.Pages, p.High.GPA, p.High.Pages, p.PagesPerPass, p.Spin, flags, p.Seed,
		p.DMA.GPA, p.DMA.Pages, p.DMAPagesPerPass, p.MapGiB, p.Epoch,
	} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// Status is the guest's own account of its work.
type Status struct {
	Passes   uint64
	Pages    uint64 // written by the vCPU
	Errors   uint64 // pages found to hold what the guest did not write
	ErrorGPA uint64 // the last of them
	DMAPages uint64 // written by DMA
	DMAReady bool   // the fw_cfg item was found

	Clock uint64 // the time-stamp counter as it was last read; 0 unless Parameters.Clock. TCG's stands while the machine does
	Gap   uint64 // the longest time between two readings, in its ticks
	Epoch uint64 // that Gap is of
}

// ParseStatus reads the StatusBytes bytes at StatusGPA. It reports false while the guest has not begun.
func ParseStatus(b []byte) (Status, bool) {
	if len(b) < StatusBytes || string(b[:8]) != magic {
		return Status{}, false
	}
	word := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	return Status{
		Passes: word(0x08), Pages: word(0x10), Errors: word(0x18), ErrorGPA: word(0x20),
		DMAPages: word(0x28), DMAReady: word(0x38) != 0,
		Clock: word(0x40), Gap: word(0x48), Epoch: word(0x50),
	}, true
}

// Item returns the content of the fw_cfg item: random bytes from seed.
func Item(seed uint64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, ItemBytes)
	rand.NewChaCha8(key).Read(b)
	return b
}

// ROM returns the guest's ROM with the parameters in it. The assembled ROM is kept in the directory cache, under a name
// that changes with its source. It needs GNU as and ld; where they are missing the error is an *exec.Error.
func ROM(ctx context.Context, cache string, p Parameters) ([]byte, error) {
	rom, err := assembled(ctx, cache)
	if err != nil {
		return nil, fmt.Errorf("assemble the bare-metal guest: %w", err)
	}
	copy(rom[romParametersOff:], p.Bytes())
	return rom, nil
}

func assembled(ctx context.Context, cache string) ([]byte, error) {
	sum := sha256.New()
	sum.Write(source)
	sum.Write(script)
	name := filepath.Join(cache, "writer-"+hex.EncodeToString(sum.Sum(nil)[:8])+".rom")
	if rom, err := os.ReadFile(name); err == nil && len(rom) == romBytes {
		return rom, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(cache, "writer-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for file, content := range map[string][]byte{"writer.S": source, "writer.ld": script} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o644); err != nil {
			return nil, err
		}
	}
	for _, args := range [][]string{
		{"as", "--32", "-o", "writer.o", "writer.S"},
		{"ld", "-m", "elf_i386", "-T", "writer.ld", "--oformat", "binary", "-o", "writer.rom", "writer.o"},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", args[0], err, out)
		}
	}
	rom, err := os.ReadFile(filepath.Join(dir, "writer.rom"))
	if err != nil {
		return nil, err
	}
	if len(rom) != romBytes {
		return nil, fmt.Errorf("the ROM has %d bytes, not %d", len(rom), romBytes)
	}
	return rom, os.Rename(filepath.Join(dir, "writer.rom"), name)
}
