package image

import (
	"fmt"
	"hash"
)

// recordWriter writes one file of an image from its first byte to its last and takes its digest on the way.
type recordWriter struct {
	*sealer
	name   string // for errors
	file   diskFile
	comp   *compressor
	digest hash.Hash
	offset int64  // of what is appended next
	onDisk int64  // bytes written
	buf    []byte // what comes behind them
	err    error  // the first; nothing is written after it
}

// writeBytes is how much is gathered before it is written.
const writeBytes = 1 << 20

// newRecordWriter creates a file and writes its header.
func newRecordWriter(d disk, keys *derived, path string, s *sealer, repository ID, how Compression) (*recordWriter, error) {
	comp, err := newCompressor(how)
	if err != nil {
		return nil, err
	}
	f, err := d.create(path)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	w := &recordWriter{sealer: s, name: path, file: f, comp: comp, digest: keys.newFileDigest()}
	w.write(s.fileHeader(repository))
	return w, nil
}

// append compresses, seals and writes one record. The header's lengths and compression are filled in.
func (w *recordWriter) append(h recordHeader, raw []byte) error {
	if len(raw) > maxRawBytes {
		return fmt.Errorf("write %s: a record of %d bytes", w.name, len(raw))
	}
	record := make([]byte, recordHeaderBytes, recordOverhead+bound(len(raw)))
	record, h.compression = w.comp.append(record, raw)
	h.raw, h.stored = uint32(len(raw)), uint32(len(record)-recordHeaderBytes)
	h.encode(record)
	record = append(record, make([]byte, tagBytes)...)
	w.seal(record, w.offset)
	return w.write(record)
}

// write appends bytes that are complete as they are.
func (w *recordWriter) write(p []byte) error {
	if w.err != nil {
		return w.err
	}
	w.offset += int64(len(p))
	if len(w.buf)+len(p) > writeBytes {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if len(w.buf) == 0 && len(p) >= writeBytes/4 {
		return w.put(p) // a batch of frames is as good a write as any: it need not be copied first
	}
	w.buf = append(w.buf, p...)
	return nil
}

// flush writes out what was gathered.
func (w *recordWriter) flush() error {
	if len(w.buf) == 0 {
		return w.err
	}
	err := w.put(w.buf)
	w.buf = w.buf[:0]
	return err
}

func (w *recordWriter) put(p []byte) error {
	if w.err != nil {
		return w.err
	}
	if _, err := w.file.WriteAt(p, w.onDisk); err != nil {
		w.err = fmt.Errorf("write %s: %w", w.name, err)
		return w.err
	}
	w.digest.Write(p)
	w.file.written(w.onDisk, int64(len(p)))
	w.onDisk += int64(len(p))
	return nil
}

// finish writes what is left, syncs, and returns the file's size and digest. The file is closed whatever happens.
func (w *recordWriter) finish() (FileInfo, error) {
	err := w.flush()
	if err == nil {
		if err = w.file.Sync(); err != nil {
			err = fmt.Errorf("sync %s: %w", w.name, err)
		}
	}
	if closing := w.file.Close(); err == nil && closing != nil {
		err = fmt.Errorf("close %s: %w", w.name, closing)
	}
	if err != nil {
		return FileInfo{}, err
	}
	info := FileInfo{Bytes: w.offset}
	w.digest.Sum(info.Digest[:0])
	return info, nil
}
