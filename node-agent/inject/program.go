package inject

import "time"

// Program is a list of operations, done in order in one stop. The first that fails ends it; what the program had opened
// in the process by then is closed again.
type Program []Operation

// Operation is one step of a program. It is made by the functions below.
type Operation struct {
	Kind kind       `json:"kind"`
	Name string     `json:"name,omitempty"` // of a memfd
	File RemoteFile `json:"file,omitzero"`  // to be closed, mapped, or the virtual machine

	Address uint64       `json:"address,omitempty"` // of memory in the process
	Bytes   uint64       `json:"bytes,omitempty"`   // of that memory
	Slots   []MemorySlot `json:"slots,omitempty"`
}

type kind string

const (
	kindUserfaultfd     kind = "userfaultfd"
	kindSyncUserfaultfd kind = "sync-userfaultfd"
	kindPipe            kind = "pipe"
	kindMemfd           kind = "memfd"
	kindClose           kind = "close"
	kindSharedMemory    kind = "shared-memory"
	kindUnmap           kind = "unmap"
)

// OpenUserfaultfd makes a userfaultfd for faults in user mode (UFFD_USER_MODE_ONLY). That needs no privilege in the
// process, and is enough for asynchronous write protection, which the kernel resolves by itself for its own accesses
// too. Never guard synchronously with it: a fault in kernel mode is answered by EFAULT, and the VM stops.
func OpenUserfaultfd() Operation { return Operation{Kind: kindUserfaultfd} }

// OpenSyncUserfaultfd makes a userfaultfd for all faults, the kernel's included. The process may not open
// /dev/userfaultfd: the helper does, and hands it in.
func OpenSyncUserfaultfd() Operation { return Operation{Kind: kindSyncUserfaultfd} }

// OpenPipe makes a pipe and closes its read end again: the process keeps the write end alone, and a reader comes from
// outside, by opening /proc/PID/fd/N. Opened as /proc/self/fd/N in the process, a pipe without readers does not block
// as a FIFO would, and a write into it is EPIPE.
func OpenPipe() Operation { return Operation{Kind: kindPipe} }

// OpenMemfd makes a file in memory; name shows in /proc/PID/maps and is at most 249 bytes (memfd_create(2)).
func OpenMemfd(name string) Operation { return Operation{Kind: kindMemfd, Name: name} }

// Close closes file, if its descriptor still is that file. Of a userfaultfd with ranges registered, close the local
// duplicate last: the one who closes the last pays for lifting the protection, and it should not be QEMU's main thread.
func Close(file RemoteFile) Operation { return Operation{Kind: kindClose, File: file} }

// OpenSharedMemory makes a file in memory of that size, as OpenMemfd does, and maps it into the process: memory that the process and this one
// share. Only for a main thread.
func OpenSharedMemory(name string, bytes uint64) Operation {
	return Operation{Kind: kindSharedMemory, Name: name, Bytes: bytes}
}

// Unmap unmaps memory of [OpenSharedMemory], if the file still is mapped there; one that is not is no error.
func Unmap(file RemoteFile, address, bytes uint64) Operation {
	return Operation{Kind: kindUnmap, File: file, Address: address, Bytes: bytes}
}

// Report is what a program did.
type Report struct {
	Files     []RemoteFile // one for each operation: the file opened, closed or worked with
	Addresses []uint64     // one for each operation: of the memory mapped
	Slots     []MemorySlot // found, of all operations together

	Stop     time.Duration // how long the thread was kept from its own work
	Attempts int           // stops made until the thread was found at a ppoll
}
