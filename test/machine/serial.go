package machine

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
)

// Serial is the guest's serial console: what it printed since QEMU's start, as lines.
type Serial struct {
	m    *Machine
	path string
}

// Lines returns the whole lines printed so far, without their line ends.
func (s *Serial) Lines() ([]string, error) {
	b, err := os.ReadFile(s.path)
	if err != nil {
		return nil, fmt.Errorf("read the serial log: %w", err)
	}
	end := bytes.LastIndexByte(b, '\n')
	if end < 0 {
		return nil, nil
	}
	lines := strings.Split(string(b[:end]), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, "\r")
	}
	return lines, nil
}

// WaitLine waits for a line that match accepts, among those printed already from line number from on, and returns it with
// its number. from = 0 looks at all of them; one more than the number returned looks at what follows. It fails when the
// guest's kernel panicked.
func (s *Serial) WaitLine(ctx context.Context, from int, match func(line string) bool) (string, int, error) {
	for {
		lines, err := s.Lines()
		if err != nil {
			return "", 0, err
		}
		for ; from < len(lines); from++ {
			if match(lines[from]) {
				return lines[from], from, nil
			}
			if strings.Contains(lines[from], "end Kernel panic") {
				return "", 0, fmt.Errorf("the guest says: %s", lines[from])
			}
		}
		if err := s.m.pollAgain(ctx); err != nil {
			return "", 0, fmt.Errorf("wait for a line on the serial console (%d so far, the last %q): %w", len(lines), last(lines), err)
		}
	}
}

func last(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	return lines[len(lines)-1]
}
