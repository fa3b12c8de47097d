package machine

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// hostAddress returns where a guest-physical address lies in QEMU's address space.
func (m *Machine) hostAddress(ctx context.Context, gpa uint64) (uint64, error) {
	m.mu.Lock()
	hva, known := m.addresses[gpa]
	m.mu.Unlock()
	if known {
		return hva, nil
	}
	answer, err := qemu.Human(ctx, m.Monitor, fmt.Sprintf("gpa2hva %#x", gpa))
	if err != nil {
		return 0, err
	}
	// Host virtual address for 0x7000 (pc.ram) is 0x7f1234567000
	_, address, found := strings.Cut(answer, ") is ")
	if _, err := fmt.Sscanf(strings.TrimSpace(address), "0x%x", &hva); !found || err != nil {
		return 0, fmt.Errorf("host address of gpa %#x: QEMU says %q", gpa, strings.TrimSpace(answer))
	}
	m.mu.Lock()
	m.addresses[gpa] = hva
	m.mu.Unlock()
	return hva, nil
}

// ReadGuest fills b from the guest's physical memory. The bytes must lie in one RAM block, where they are backed by
// memory below 1 MiB or by neighbouring addresses of that block.
func (m *Machine) ReadGuest(ctx context.Context, gpa uint64, b []byte) error {
	hva, err := m.hostAddress(ctx, gpa)
	if err != nil {
		return err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", m.PID))
	if err != nil {
		return fmt.Errorf("read guest memory: %w", err)
	}
	defer f.Close()
	if _, err := f.ReadAt(b, int64(hva)); err != nil {
		return fmt.Errorf("read %d bytes of guest memory at gpa %#x: %w", len(b), gpa, err)
	}
	return nil
}

// WriteGuest stores b in the guest's physical memory, as ReadGuest reads it. KVM's dirty log does not see it.
func (m *Machine) WriteGuest(ctx context.Context, gpa uint64, b []byte) error {
	hva, err := m.hostAddress(ctx, gpa)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", m.PID), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write guest memory: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, int64(hva)); err != nil {
		return fmt.Errorf("write %d bytes of guest memory at gpa %#x: %w", len(b), gpa, err)
	}
	return nil
}
