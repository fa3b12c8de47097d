package machine

import (
	"fmt"

	"github.com/google/uuid"
)

// Version is a series of QEMU.
type Version string

// The versions of QEMU that tests run on: Debian 12's own, and the one of KubeVirt's time (backports; Debian 13's own).
const (
	V72 Version = "7.2"
	V10 Version = "10.0"
)

// Accel is what runs the guest's code.
type Accel string

const (
	TCG Accel = "tcg"
	KVM Accel = "kvm"
)

// Memory is what guest memory is made of.
type Memory string

const (
	Private      Memory = "private"       // anonymous memory, KubeVirt's default
	Memfd        Memory = "memfd"         // a shared memfd: KubeVirt's choice with virtiofs, passt or huge pages
	MemfdPrivate Memory = "memfd-private" // a memfd mapped privately
)

// Guest is what the machine runs: a [Writer] or a [Linux].
type Guest interface {
	// prepare makes the guest's files in dir and returns QEMU's arguments for it.
	prepare(p *preparation) ([]string, error)
}

// Options describe a machine. The zero value is not one: Guest must be set. Everything else has a default.
type Options struct {
	Name string // default: test-UUID's beginning
	UUID string // default: random

	QEMU        Version // default V72
	MachineType string  // default: the QEMU version's own q35, which a newer QEMU has too
	Accel       Accel   // default TCG

	MemoryBytes uint64 // default 256 MiB; whole MiB
	Memory      Memory // default Private
	NUMANodes   int    // default 1; more give as many RAM blocks of equal size
	VCPUs       int    // default 1

	Guest Guest

	// Balloon adds a virtio balloon, FreePageReporting lets it report pages as they become free (and implies it).
	Balloon           bool
	FreePageReporting bool

	Disk *Disk // a virtio disk, or none
	Net  bool  // a virtio network card on QEMU's user network, cut off from the host

	// Paused leaves the guest standing before its first instruction (-S): the run state is prelaunch.
	Paused bool

	// Args are added to QEMU's command line.
	Args []string
}

// Disk is a raw virtio-blk disk with known content; see workload.Sector.
type Disk struct {
	Bytes    uint64 // default DefaultDiskBytes
	IOThread bool   // served by a thread of its own, not by QEMU's main thread
	AIO      string // threads (default), native or io_uring
	Direct   bool   // bypasses the host's page cache, so that the device writes to pinned pages; native needs it
	Path     string // default: a new file in the machine's directory
}

// MiB and GiB are for reading sizes.
const (
	MiB uint64 = 1 << 20
	GiB uint64 = 1 << 30
)

// DefaultDiskBytes is the size of a disk that names none.
const DefaultDiskBytes = 64 * MiB

// withDefaults fills what was left out, so that the result describes the machine whole.
func (o Options) withDefaults() (Options, error) {
	if o.Guest == nil {
		return o, fmt.Errorf("machine options name no guest")
	}
	if o.UUID == "" {
		o.UUID = uuid.NewString()
	}
	if o.Name == "" {
		o.Name = "test-" + o.UUID[:8]
	}
	o.QEMU = orDefault(o.QEMU, V72)
	o.MachineType = orDefault(o.MachineType, "pc-q35-"+string(o.QEMU))
	o.Accel = orDefault(o.Accel, TCG)
	o.MemoryBytes = orDefault(o.MemoryBytes, 256*MiB)
	o.Memory = orDefault(o.Memory, Private)
	o.NUMANodes = orDefault(o.NUMANodes, 1)
	o.VCPUs = orDefault(o.VCPUs, 1)
	o.Balloon = o.Balloon || o.FreePageReporting
	if o.MemoryBytes%(uint64(o.NUMANodes)*MiB) != 0 {
		return o, fmt.Errorf("%d bytes of memory are not whole MiB on each of %d NUMA nodes", o.MemoryBytes, o.NUMANodes)
	}
	if o.Disk != nil {
		d := *o.Disk
		d.Bytes = orDefault(d.Bytes, DefaultDiskBytes)
		d.AIO = orDefault(d.AIO, "threads")
		o.Disk = &d
	}
	return o, nil
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// String names what distinguishes one machine from another: for the names of subtests.
func (o Options) String() string {
	return fmt.Sprintf("%s-%s-%s", orDefault(o.QEMU, V72), orDefault(o.Accel, TCG), orDefault(o.Memory, Private))
}
