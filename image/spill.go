package image

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// A run is a file of extents, sorted and resolved, that a writer puts into its temporary directory when it holds too many
// in memory. Runs never outlive their writer, and their layout is no part of the format; but they lie on a volume that
// somebody else owns, so they are sealed like everything else.
const (
	runEntryBytes     = 64
	runRecordEntries  = 1024
	runRecordRawBytes = runRecordEntries * runEntryBytes
)

func (e *extent) encodeRun(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, e.block)
	dst = append(dst, byte(e.kind), e.slot, e.frame.pages, 0)
	dst = le.AppendUint64(dst, e.first)
	dst = le.AppendUint64(dst, e.count)
	dst = le.AppendUint64(dst, e.seq)
	dst = le.AppendUint64(dst, e.word)
	dst = le.AppendUint32(dst, e.frame.file)
	dst = le.AppendUint32(dst, e.frame.stored)
	dst = le.AppendUint64(dst, uint64(e.frame.offset))
	return le.AppendUint64(dst, e.frame.ordinal)
}

func decodeRun(b []byte) extent {
	le := binary.LittleEndian
	return extent{
		block: le.Uint32(b),
		kind:  Kind(b[4]), slot: b[5],
		first: le.Uint64(b[8:]), count: le.Uint64(b[16:]), seq: le.Uint64(b[24:]), word: le.Uint64(b[32:]),
		frame: frame{
			file: le.Uint32(b[40:]), stored: le.Uint32(b[44:]), pages: b[6],
			offset: int64(le.Uint64(b[48:])), ordinal: le.Uint64(b[56:]),
		},
	}
}

// writeRun writes all of src to a new file and returns how many extents there were.
func writeRun(f diskFile, s *sealer, src source) (entries uint64, err error) {
	record := make([]byte, recordHeaderBytes, recordOverhead+runRecordRawBytes)
	offset := int64(fileHeaderBytes)
	var number, first uint64
	flush := func() error {
		raw := uint32(len(record) - recordHeaderBytes)
		recordHeader{kind: runRecord, raw: raw, stored: raw, number: number, first: first}.encode(record)
		record = append(record, make([]byte, tagBytes)...)
		s.seal(record, offset)
		if _, err := f.WriteAt(record, offset); err != nil {
			return err
		}
		offset += int64(len(record))
		number, first = number+1, entries
		record = record[:recordHeaderBytes]
		return nil
	}
	for {
		e, ok, err := src()
		if err != nil {
			return 0, err
		}
		if !ok {
			break
		}
		record = e.encodeRun(record)
		entries++
		if len(record) == recordHeaderBytes+runRecordRawBytes {
			if err := flush(); err != nil {
				return 0, err
			}
		}
	}
	if len(record) > recordHeaderBytes {
		return entries, flush()
	}
	return entries, nil
}

// readRun yields the extents of a run back.
func readRun(f *os.File, s *sealer, entries uint64) source {
	file := &sealedFile{sealer: s, image: "being written", name: "sorted run", file: f}
	reader := new(recordReader)
	offset := int64(fileHeaderBytes)
	var payload []byte
	var read, number uint64
	return func() (extent, bool, error) {
		if len(payload) == 0 {
			if read == entries {
				return extent{}, false, nil
			}
			if file.size == 0 {
				size, err := f.Seek(0, io.SeekEnd)
				if err != nil {
					return extent{}, false, fmt.Errorf("sorted run: %w", err)
				}
				file.size = size
			}
			n := min(runRecordEntries, entries-read)
			length := int64(recordOverhead + n*runEntryBytes)
			h, p, err := reader.read(file, runRecord, offset, length)
			if err != nil {
				return extent{}, false, err
			}
			if h.number != number || h.first != read {
				return extent{}, false, file.damage(offset, "not the record that belongs here")
			}
			payload, offset, number, read = p, offset+length, number+1, read+n
		}
		e := decodeRun(payload)
		payload = payload[runEntryBytes:]
		return e, true, nil
	}
}
