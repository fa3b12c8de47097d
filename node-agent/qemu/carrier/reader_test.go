package carrier

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// snapshotted is what an image holds.
type snapshotted struct {
	tag   string
	date  time.Time
	state []byte
}

// qcow2 is an image that is being read. The reader is written after QEMU's docs/interop/qcow2 and shares nothing with Write: it follows the
// tables wherever they lie.
type qcow2 struct {
	image      []byte
	cluster    uint64 // bytes
	references map[uint64]uint16
}

// readQCOW2 reads an image with one snapshot and a disk that nobody wrote to. Anything that is not as it must be is an error: among it a
// cluster that is counted other than it is used, and a byte that belongs to nothing and is not zero.
func readQCOW2(image []byte) (s snapshotted, err error) {
	const fixed = 104 // bytes of a version 3 header
	if len(image) < fixed {
		return s, errors.New("no header")
	}
	be := binary.BigEndian
	h := image[:fixed]
	bits := be.Uint32(h[20:])
	switch {
	case string(h[:4]) != "QFI\xfb" || be.Uint32(h[4:]) != 3:
		return s, errors.New("not a qcow2 of version 3")
	case be.Uint64(h[8:]) != 0 || be.Uint32(h[16:]) != 0:
		return s, errors.New("a backing file")
	case bits < 9 || bits > 21:
		return s, fmt.Errorf("clusters of 2^%d bytes", bits)
	case be.Uint32(h[32:]) != 0 || !zero(h[72:96]):
		return s, errors.New("encryption, or feature bits")
	case be.Uint32(h[96:]) != 4 || be.Uint32(h[100:]) != fixed:
		return s, errors.New("refcounts of another width, or a longer header")
	case be.Uint32(h[60:]) != 1:
		return s, errors.New("not one snapshot")
	}
	q := qcow2{image, 1 << bits, map[uint64]uint16{0: 1}}
	if uint64(len(image))%q.cluster != 0 || !zero(image[fixed:q.cluster]) { // behind the header the end of its extensions
		return s, errors.New("a broken cluster, or header extensions")
	}
	diskBytes, diskEntries := be.Uint64(h[24:]), uint64(be.Uint32(h[36:]))
	covered := q.cluster / 8 * q.cluster // by an L1 entry
	stateEntry := (diskBytes + covered - 1) / covered
	if diskBytes == 0 || diskBytes%512 != 0 || diskEntries < stateEntry {
		return s, fmt.Errorf("a disk of %d bytes with %d L1 entries", diskBytes, diskEntries)
	}
	disk, err := q.take(be.Uint64(h[40:]), 8*diskEntries)
	if err != nil {
		return s, fmt.Errorf("the disk's L1 table: %w", err)
	}
	if !zero(disk) {
		return s, errors.New("a disk that is not empty")
	}

	// The snapshot.
	e, err := q.take(be.Uint64(h[64:]), q.cluster) // its last entry ends where it likes
	if err != nil {
		return s, fmt.Errorf("the snapshot table: %w", err)
	}
	idBytes, tagBytes, extraBytes := uint64(be.Uint16(e[12:])), uint64(be.Uint16(e[14:])), uint64(be.Uint32(e[36:]))
	s.date = time.Unix(int64(be.Uint32(e[16:])), int64(be.Uint32(e[20:])))
	if extraBytes != 16 || 40+extraBytes+idBytes+tagBytes > uint64(len(e)) || idBytes == 0 || !zero(e[40+extraBytes+idBytes+tagBytes:]) {
		return s, errors.New("a snapshot table of another length")
	}
	stateBytes := be.Uint64(e[40:])
	if uint64(be.Uint32(e[32:])) != stateBytes || be.Uint64(e[48:]) != diskBytes || be.Uint64(e[24:]) != 0 {
		return s, errors.New("a snapshot of another disk, or with two lengths of its state, or with a clock")
	}
	s.tag = string(e[40+extraBytes+idBytes:][:tagBytes])

	// Its L1 table, and the state that it maps behind the disk.
	l1, err := q.take(be.Uint64(e), 8*uint64(be.Uint32(e[8:])))
	if err != nil {
		return s, fmt.Errorf("the snapshot's L1 table: %w", err)
	}
	if uint64(len(l1)) <= 8*stateEntry || !zero(l1[:8*stateEntry]) {
		return s, errors.New("a snapshot's disk that is not empty, or no state behind it")
	}
	for l1 = l1[8*stateEntry:]; len(l1) > 0; l1 = l1[8:] {
		if be.Uint64(l1) == 0 {
			continue
		}
		l2, err := q.take(be.Uint64(l1), q.cluster)
		if err != nil {
			return s, fmt.Errorf("an L2 table: %w", err)
		}
		for ; len(l2) > 0; l2 = l2[8:] {
			if be.Uint64(l2) == 0 {
				continue
			}
			data, err := q.take(be.Uint64(l2), q.cluster)
			if err != nil {
				return s, fmt.Errorf("a cluster of the state: %w", err)
			}
			s.state = append(s.state, data...)
		}
	}
	if stateBytes > uint64(len(s.state)) || uint64(len(s.state))-stateBytes >= q.cluster || !zero(s.state[stateBytes:]) {
		return s, fmt.Errorf("a state of %d bytes in clusters of %d together", stateBytes, len(s.state))
	}
	s.state = s.state[:stateBytes]
	return s, q.checkRefcounts(be.Uint64(h[48:]), uint64(be.Uint32(h[56:])))
}

// take returns n bytes from a cluster's beginning on, and counts the clusters that they lie in. What is behind them in the last one must be
// zero.
func (q *qcow2) take(offset, n uint64) ([]byte, error) {
	end := (offset + n + q.cluster - 1) / q.cluster * q.cluster
	if offset%q.cluster != 0 || n == 0 || offset >= uint64(len(q.image)) || n > uint64(len(q.image)) || end > uint64(len(q.image)) {
		return nil, fmt.Errorf("%d bytes at %#x of %d", n, offset, len(q.image))
	}
	for at := offset; at < end; at += q.cluster {
		q.references[at/q.cluster]++
	}
	if !zero(q.image[offset+n : end]) {
		return nil, fmt.Errorf("something behind the %d bytes at %#x", n, offset)
	}
	return q.image[offset : offset+n], nil
}

// checkRefcounts compares what is counted with what was taken.
func (q *qcow2) checkRefcounts(table, clusters uint64) error {
	entries, err := q.take(table, clusters*q.cluster)
	if err != nil {
		return fmt.Errorf("the refcount table: %w", err)
	}
	counts := map[uint64]uint16{}
	for i := uint64(0); i < uint64(len(entries)); i += 8 {
		block := binary.BigEndian.Uint64(entries[i:])
		if block == 0 {
			continue
		}
		b, err := q.take(block, q.cluster)
		if err != nil {
			return fmt.Errorf("a refcount block: %w", err)
		}
		for j := uint64(0); j < q.cluster; j += 2 {
			if n := binary.BigEndian.Uint16(b[j:]); n != 0 {
				counts[i/8*q.cluster/2+j/2] = n
			}
		}
	}
	for c := range uint64(len(q.image)) / q.cluster {
		if counts[c] != q.references[c] || counts[c] != 1 {
			return fmt.Errorf("cluster %d is used %d times, and counted %d times", c, q.references[c], counts[c])
		}
		delete(counts, c)
	}
	if len(counts) > 0 {
		return fmt.Errorf("%d clusters behind the end are counted", len(counts))
	}
	return nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
