package pagetable

import (
	"errors"
	"fmt"
)

var (
	// ErrNotTracked: a scan met memory that is not registered with an asynchronous write-protect userfaultfd, so it says
	// nothing about what was written there. Where the scan protected as it went, what it had protected before it failed is
	// lost: tracking of the whole range has to begin anew.
	ErrNotTracked = errors.New("memory is not tracked by asynchronous write-protect")

	// ErrUnsupported: this kernel lacks the call or the feature asked for.
	ErrUnsupported = errors.New("not supported by this kernel")

	// ErrOwned: the range is registered with another userfaultfd.
	ErrOwned = errors.New("range is registered with another userfaultfd")
)

// FaultError is a page of the other process that could not be read or written: unmapped, protected from it, or beyond the
// end of its file.
type FaultError struct {
	PID     int
	Address uint64 // the first one that could not be transferred
	Write   bool
	Err     error
}

func (e *FaultError) Error() string {
	verb := "read"
	if e.Write {
		verb = "write"
	}
	return fmt.Sprintf("%s memory of process %d at %#x: %v", verb, e.PID, e.Address, e.Err)
}

func (e *FaultError) Unwrap() error { return e.Err }
