package carrier

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// The format is that of QEMU's docs/interop/qcow2, version 3. All integers are big-endian.
const (
	clusterBits  = 16
	clusterBytes = 1 << clusterBits
	diskBytes    = clusterBytes // the guest's disk: never written, never read

	clusterRefcountTable = 1
	clusterRefcountBlock = 2
	clusterDiskL1        = 3
	clusterSnapshots     = 4
	clusterSnapshotL1    = 5
	clusterSnapshotL2    = 6
	clusterVMState       = 7

	l1Entries      = 2 // one for the disk, one for the vmstate
	vmstateL1Index = 1

	headerLength  = 104
	refcountOrder = 4  // 16 bits
	snapshotFixed = 40 // of an entry of the snapshot table
	snapshotExtra = 16 // 64-bit vmstate size, disk size
	snapshotID    = "1"
	maxTagBytes   = 255
)

// One L2 table and one refcount block are enough for any state that is taken.
var (
	_ [clusterBytes/8 - devstate.MaxBytes/clusterBytes]struct{}
	_ [clusterBytes/2 - (clusterVMState + devstate.MaxBytes/clusterBytes)]struct{}
)

// stateClusters is how many clusters a state takes up.
func stateClusters(state []byte) int { return (len(state) + clusterBytes - 1) / clusterBytes }

// Bytes is the size of the image for a state.
func Bytes(state []byte) int64 {
	return int64(clusterVMState+stateClusters(state)) * clusterBytes
}

// Write writes the image. tag is the name by which QEMU finds the snapshot, and date what tools show as its time.
func Write(w io.Writer, state []byte, tag string, date time.Time) error {
	switch {
	case len(state) == 0 || len(state) > devstate.MaxBytes:
		return fmt.Errorf("carrier: a device state of %d bytes", len(state))
	case tag == "" || len(tag) > maxTagBytes || tag == snapshotID || strings.IndexFunc(tag, unicode.IsControl) >= 0:
		// QEMU looks a tag up among the snapshots' ids too.
		return fmt.Errorf("carrier: bad tag %.80q", tag)
	case date.Unix() < 0 || date.Unix() > 1<<32-1:
		return fmt.Errorf("carrier: date %v is out of range", date)
	}
	meta := make([]byte, clusterVMState*clusterBytes)
	cluster := func(n int) []byte { return meta[n*clusterBytes : (n+1)*clusterBytes] }

	header(cluster(0))
	binary.BigEndian.PutUint64(cluster(clusterRefcountTable), offset(clusterRefcountBlock))
	for i := range clusterVMState + stateClusters(state) {
		binary.BigEndian.PutUint16(cluster(clusterRefcountBlock)[2*i:], 1)
	}
	snapshot(cluster(clusterSnapshots), len(state), tag, date)
	binary.BigEndian.PutUint64(cluster(clusterSnapshotL1)[8*vmstateL1Index:], offset(clusterSnapshotL2))
	for i := range stateClusters(state) {
		binary.BigEndian.PutUint64(cluster(clusterSnapshotL2)[8*i:], offset(clusterVMState+i))
	}

	padding := make([]byte, stateClusters(state)*clusterBytes-len(state))
	for _, part := range [][]byte{meta, state, padding} {
		if _, err := w.Write(part); err != nil {
			return fmt.Errorf("carrier: %w", err)
		}
	}
	return nil
}

func offset(cluster int) uint64 { return uint64(cluster) * clusterBytes }

func header(b []byte) {
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3) // version
	be.PutUint32(b[20:], clusterBits)
	be.PutUint64(b[24:], diskBytes)
	be.PutUint32(b[36:], l1Entries)
	be.PutUint64(b[40:], offset(clusterDiskL1))
	be.PutUint64(b[48:], offset(clusterRefcountTable))
	be.PutUint32(b[56:], 1) // clusters of the refcount table
	be.PutUint32(b[60:], 1) // snapshots
	be.PutUint64(b[64:], offset(clusterSnapshots))
	be.PutUint32(b[96:], refcountOrder)
	be.PutUint32(b[100:], headerLength)
	// Zeros elsewhere: no backing file, no encryption, no feature bits; behind the header the end of its extensions.
}

func snapshot(b []byte, stateBytes int, tag string, date time.Time) {
	be := binary.BigEndian
	be.PutUint64(b[0:], offset(clusterSnapshotL1))
	be.PutUint32(b[8:], l1Entries)
	be.PutUint16(b[12:], uint16(len(snapshotID)))
	be.PutUint16(b[14:], uint16(len(tag)))
	be.PutUint32(b[16:], uint32(date.Unix()))
	be.PutUint32(b[20:], uint32(date.Nanosecond()))
	be.PutUint32(b[32:], uint32(stateBytes))
	be.PutUint32(b[36:], snapshotExtra)
	be.PutUint64(b[40:], uint64(stateBytes))
	be.PutUint64(b[48:], diskBytes)
	copy(b[snapshotFixed+snapshotExtra:], snapshotID+tag)
}
