package machine

import (
	"encoding/binary"
	"os"
	"path/filepath"
)

// Idle is a guest that halts its processor as soon as it has said that it is ready, and leaves memory alone: for measuring what does
// not depend on a guest.
type Idle struct{}

// idleCode prints a text on the serial port and halts, in real mode at idleOffset of the last 64 KiB below 4 GiB.
var idleCode = []byte{
	0xba, 0xf8, 0x03, //       mov dx, 0x3f8
	0xbe, 0x14, 0xff, //       mov si, text
	0x2e, 0xac, //       next: cs lodsb
	0x84, 0xc0, //             test al, al
	0x74, 0x03, //             jz halt
	0xee,       //             out dx, al
	0xeb, 0xf7, //             jmp next
	0xfa,       //       halt: cli
	0xf4,       //             hlt
	0xeb, 0xfc, //             jmp halt
	0x90, // text:
}

const (
	idleOffset = 0xff00
	idleText   = "writer: ready\r\n\x00" // what Machine.Ready waits for with every guest but Linux
	romBytes   = 64 << 10
	resetAt    = 0xfff0 // Intel SDM volume 3, "First Instruction Executed"
)

func (Idle) prepare(p *preparation) ([]string, error) {
	rom := make([]byte, romBytes)
	copy(rom[idleOffset:], idleCode)
	copy(rom[idleOffset+len(idleCode):], idleText)
	rom[resetAt] = 0xe9 // jmp rel16
	to := idleOffset - (resetAt + 3)
	binary.LittleEndian.PutUint16(rom[resetAt+1:], uint16(to))
	bios := filepath.Join(p.dir, "idle.rom")
	if err := os.WriteFile(bios, rom, 0o644); err != nil {
		return nil, err
	}
	return []string{"-bios", bios}, nil
}
