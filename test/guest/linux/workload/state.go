package workload

import "fmt"

// State is what the guest says of its counter, on the serial console and on the channel.
type State struct {
	Count uint64
	Hash  uint64
	OK    bool // the buffer was what it must be
}

// String gives the state as the guest prints it.
func (s State) String() string {
	if !s.OK {
		return fmt.Sprintf("count=%d hash=%016x CORRUPT", s.Count, s.Hash)
	}
	return fmt.Sprintf("count=%d hash=%016x ok", s.Count, s.Hash)
}

// ParseState reads a line that State.String made; any other line gives false.
func ParseState(line string) (State, bool) {
	var s State
	var verdict string
	n, err := fmt.Sscanf(line, "count=%d hash=%x %s", &s.Count, &s.Hash, &verdict)
	s.OK = verdict == "ok"
	return s, n == 3 && err == nil && (s.OK || verdict == "CORRUPT")
}
