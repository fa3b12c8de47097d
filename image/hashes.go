package image

import (
	"hash"

	"github.com/minio/highwayhash"
)

// A data file has a second one beside it: the keyed hash of every page in it, in the order of the pages' ordinals. So
// "is this page what the parent has" is answered by reading sixteen bytes, not a frame. The hashes stand in records of
// equal size, so that their place follows from the ordinal.
const (
	hashBytes       = highwayhash.Size128
	blockHashes     = 256
	hashRecordBytes = recordOverhead + blockHashes*hashBytes
)

type pageHash [hashBytes]byte

// hashPage is HighwayHash-128 under the key for page hashes. Two pages with one hash are taken to be equal: without the
// key nobody can make such a pair, and by chance there is none in 2^64 pages.
func (d *derived) hashPage(page []byte) pageHash { return highwayhash.Sum128(page, d.page[:]) }

// newFileDigest returns what takes the [Digest] of a file.
func (d *derived) newFileDigest() hash.Hash {
	h, err := highwayhash.New(d.file[:])
	if err != nil {
		panic(err) // only a key of another length than 32 is refused
	}
	return h
}

// hashesFileBytes returns the size of the hashes' file for that many pages.
func hashesFileBytes(pages uint64) int64 {
	size := int64(fileHeaderBytes) + int64(pages/blockHashes)*hashRecordBytes
	if rest := int64(pages % blockHashes); rest > 0 {
		size += recordOverhead + rest*hashBytes
	}
	return size
}

// hashWriter writes the hashes' file of a data file, in the order of the ordinals.
type hashWriter struct {
	out   *recordWriter
	block []byte
	pages uint64 // before block
}

func (w *hashWriter) add(hashes []pageHash) error {
	for _, h := range hashes {
		w.block = append(w.block, h[:]...)
		if len(w.block) == blockHashes*hashBytes {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *hashWriter) flush() error {
	if len(w.block) == 0 {
		return nil
	}
	err := w.out.append(recordHeader{kind: hashRecord, number: w.pages / blockHashes, first: w.pages}, w.block)
	w.pages += uint64(len(w.block) / hashBytes)
	w.block = w.block[:0]
	return err
}

func (w *hashWriter) finish() (FileInfo, error) {
	if err := w.flush(); err != nil {
		w.out.file.Close()
		return FileInfo{}, err
	}
	return w.out.finish()
}

// hashBlock returns the hashes of the block that the ordinal lies in, valid until the reader's next use.
func (r *recordReader) hashBlock(f *sealedFile, ordinal, pages uint64) (first uint64, block []byte, err error) {
	n := ordinal / blockHashes
	first = n * blockHashes
	in := min(blockHashes, pages-first)
	offset := fileHeaderBytes + int64(n)*hashRecordBytes
	h, block, err := r.read(f, hashRecord, offset, recordOverhead+int64(in)*hashBytes)
	if err == nil && (h.number != n || h.first != first || h.compression != None) {
		err = f.damage(offset, "not the block of hashes that belongs here")
	}
	return first, block, err
}

// hashLookup finds hashes, keeping the last block that it read. Not for concurrent use.
type hashLookup struct {
	reader *recordReader
	file   *sealedFile
	first  uint64
	block  []byte
}

// at returns the hash of the page with that ordinal, of a data file of so many pages. ordinal is less than pages.
func (l *hashLookup) at(f *sealedFile, ordinal, pages uint64) (hash pageHash, err error) {
	if f != l.file || ordinal < l.first || ordinal-l.first >= uint64(len(l.block)/hashBytes) {
		l.file = nil
		first, block, err := l.reader.hashBlock(f, ordinal, pages)
		if err != nil {
			return hash, err
		}
		l.file, l.first, l.block = f, first, append(l.block[:0], block...)
	}
	copy(hash[:], l.block[(ordinal-l.first)*hashBytes:])
	return hash, nil
}
