package image

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Every file of an image but its manifest is a file header followed by records, and nothing between or behind them.
// A record is a header, a payload and a tag; the tag covers header and payload and binds them to the file and the place
// in it. docs/image-format.md has the byte tables that encode and decode here follow.
const (
	fileHeaderBytes   = 64
	recordHeaderBytes = 32
	tagBytes          = 16
	recordOverhead    = recordHeaderBytes + tagBytes

	// maxRawBytes bounds the payload of any record, decompressed. Most kinds have lower bounds of their own.
	maxRawBytes = 64 << 20
)

// fileMagic begins every file header; its last two characters are the version.
const fileMagic = "VMCKPT01"

// fileKind and recordKind are four letters that say what a file or a record is.
type (
	fileKind   [4]byte
	recordKind [4]byte
)

var (
	pagesFile  = fileKind{'P', 'A', 'G', 'E'}
	hashesFile = fileKind{'H', 'A', 'S', 'H'}
	indexFile  = fileKind{'I', 'N', 'D', 'X'}
	stateFile  = fileKind{'S', 'T', 'A', 'T'}
	runFile    = fileKind{'R', 'U', 'N', 'S'} // a sorted run: only ever in a writer's temporary directory

	frameRecord     = recordKind{'P', 'A', 'G', 'E'}
	hashRecord      = recordKind{'H', 'A', 'S', 'H'}
	segmentRecord   = recordKind{'I', 'N', 'D', 'X'}
	directoryRecord = recordKind{'I', 'D', 'I', 'R'}
	stateRecord     = recordKind{'S', 'T', 'A', 'T'}
	runRecord       = recordKind{'R', 'U', 'N', 'S'}
)

// ID is a random number of 128 bits that names a repository, or an image and the files written for it.
type ID [16]byte

func newID(random io.Reader) (ID, error) {
	var n ID
	if _, err := io.ReadFull(random, n[:]); err != nil {
		return ID{}, fmt.Errorf("random id: %w", err)
	}
	return n, nil
}

func (n ID) String() string { return hex.EncodeToString(n[:]) }

func (n ID) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

func (n *ID) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(n)) {
		return fmt.Errorf("id of %d characters, want %d", len(text), hex.EncodedLen(len(n)))
	}
	_, err := hex.Decode(n[:], text)
	return err
}

// recordHeader is what precedes a payload.
type recordHeader struct {
	kind        recordKind
	compression Compression
	items       uint8  // frame: pages in it
	raw         uint32 // bytes of the payload before compression
	stored      uint32 // bytes of the payload in the file
	number      uint64 // of the record among those of its kind in the file
	first       uint64 // frame, hash block: ordinal of the first page; segment, run: number of its first entry
}

func (h recordHeader) encode(dst []byte) {
	_ = dst[recordHeaderBytes-1]
	copy(dst, h.kind[:])
	dst[4] = byte(h.compression)
	dst[5] = h.items
	dst[6], dst[7] = 0, 0
	binary.LittleEndian.PutUint32(dst[8:], h.raw)
	binary.LittleEndian.PutUint32(dst[12:], h.stored)
	binary.LittleEndian.PutUint64(dst[16:], h.number)
	binary.LittleEndian.PutUint64(dst[24:], h.first)
}

func decodeRecordHeader(src []byte) recordHeader {
	return recordHeader{
		kind:        recordKind(src[:4]),
		compression: Compression(src[4]),
		items:       src[5],
		raw:         binary.LittleEndian.Uint32(src[8:]),
		stored:      binary.LittleEndian.Uint32(src[12:]),
		number:      binary.LittleEndian.Uint64(src[16:]),
		first:       binary.LittleEndian.Uint64(src[24:]),
	}
}

// total returns the record's length in the file.
func (h recordHeader) total() int64 { return recordOverhead + int64(h.stored) }

// sealer makes and checks the tags of one file, by AES-GCM under a key of the file's own: of an encrypted file the payload is
// encrypted and the header additional data, of a plain one (GMAC) both are additional data. It is safe for concurrent use.
type sealer struct {
	kind      fileKind
	id        ID
	encrypted bool
	tag       *[32]byte // the key for file headers
	aead      cipher.AEAD
}

func newSealer(keys *derived, kind fileKind, n ID, encrypted bool) (*sealer, error) {
	key := &keys.tag
	if encrypted {
		if key = keys.aead; key == nil {
			return nil, errNoEncryptionKey
		}
	}
	block, err := aes.NewCipher(keyedHash(key, 32, kind[:], n[:]))
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &sealer{kind: kind, id: n, encrypted: encrypted, tag: &keys.tag, aead: aead}, nil
}

var errNoEncryptionKey = errors.New("encrypted, and no encryption key was given")

// nonce of the record at offset. A place in a file is written once only, or again with the very same bytes, so that no nonce is ever
// used for two records: with GCM that would give the key for tags away.
func nonce(offset int64) (n [12]byte) {
	binary.LittleEndian.PutUint64(n[:], uint64(offset))
	return n
}

// split returns what of a record is authenticated, and what is encrypted as well.
func (s *sealer) split(record []byte) (additional, payload []byte) {
	body := len(record) - tagBytes
	if s.encrypted {
		return record[:recordHeaderBytes], record[recordHeaderBytes:body]
	}
	return record[:body], record[body:body]
}

// seal completes a record that will stand at offset: it encrypts the payload where the file is encrypted and fills in the tag.
func (s *sealer) seal(record []byte, offset int64) {
	n := nonce(offset)
	additional, payload := s.split(record)
	s.aead.Seal(payload[:0], n[:], payload, additional)
}

// open checks a record read at offset, decrypts it in place, and reports whether it is what was sealed there.
func (s *sealer) open(record []byte, offset int64) bool {
	n := nonce(offset)
	additional, payload := s.split(record)
	_, err := s.aead.Open(payload[:0], n[:], record[len(additional):], additional)
	return err == nil
}

// fileHeader returns the first bytes of the file.
func (s *sealer) fileHeader(repository ID) []byte {
	head := make([]byte, fileHeaderBytes)
	copy(head[0:], fileMagic)
	copy(head[8:], s.kind[:])
	if s.encrypted {
		head[12] = 1
	}
	copy(head[16:], s.id[:])
	copy(head[32:], repository[:])
	body := fileHeaderBytes - tagBytes
	copy(head[body:], keyedHash(s.tag, tagBytes, head[:body]))
	return head
}

// sealedFile is one file of an image, open for reading at any place. Safe for concurrent use.
type sealedFile struct {
	*sealer
	image string // for errors
	name  string // within the image's directory
	file  readerAtCloser
	size  int64
}

// readerAtCloser is an open file, or what a test has in place of one.
type readerAtCloser interface {
	io.ReaderAt
	io.Closer
}

func (f *sealedFile) damage(offset int64, what string, args ...any) *DamageError {
	return &DamageError{Image: f.image, File: f.name, Offset: offset, What: fmt.Sprintf(what, args...)}
}

// checkHeader reads the file header and compares it, byte by byte, with the only one that this file can have.
func (f *sealedFile) checkHeader(repository ID) error {
	got := make([]byte, fileHeaderBytes)
	if err := f.readFull(got, 0); err != nil {
		return err
	}
	want := f.fileHeader(repository)
	if subtle.ConstantTimeCompare(got, want) == 1 {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return f.damage(int64(i), "not the file header that belongs here")
		}
	}
	return nil
}

func (f *sealedFile) readFull(dst []byte, offset int64) error {
	n, err := f.file.ReadAt(dst, offset)
	if n == len(dst) {
		return nil
	}
	return readError(f.image, f.name, offset+int64(n), err)
}

// recordReader reads records and opens them. Each goroutine has its own.
type recordReader struct {
	decompressor
	buf []byte
}

// read reads the record of length bytes at offset, checks its tag, and returns its header and its payload as stored
// (decrypted, not yet decompressed), valid until the next call. The caller has bounded length, and knows it from
// something already authenticated.
func (r *recordReader) read(f *sealedFile, kind recordKind, offset, length int64) (recordHeader, []byte, error) {
	if length < recordOverhead || length > recordOverhead+maxRawBytes || offset < fileHeaderBytes || offset > f.size-length {
		return recordHeader{}, nil, f.damage(offset, "no record of %d bytes can be here", length)
	}
	if int64(cap(r.buf)) < length {
		r.buf = make([]byte, length)
	}
	buf := r.buf[:length]
	if err := f.readFull(buf, offset); err != nil {
		return recordHeader{}, nil, err
	}
	if !f.open(buf, offset) {
		return recordHeader{}, nil, f.damage(offset, "the tag does not match")
	}
	h := decodeRecordHeader(buf)
	if h.kind != kind || h.total() != length || buf[6] != 0 || buf[7] != 0 || h.raw > maxRawBytes || h.stored > h.raw ||
		(h.compression == None) != (h.stored == h.raw) || h.compression > S2 {
		return recordHeader{}, nil, f.damage(offset, "an impossible record header")
	}
	return h, buf[recordHeaderBytes : recordHeaderBytes+int64(h.stored)], nil
}

// readRaw is read and decompression, into memory of its own. limit bounds the decompressed payload.
func (r *recordReader) readRaw(f *sealedFile, kind recordKind, offset, length int64, limit uint32) (recordHeader, []byte, error) {
	h, stored, err := r.read(f, kind, offset, length)
	if err != nil {
		return h, nil, err
	}
	if h.raw > limit {
		return h, nil, f.damage(offset, "declares %d bytes, more than the %d that can be here", h.raw, limit)
	}
	raw := make([]byte, h.raw)
	if err := r.decompress(h.compression, raw, stored); err != nil {
		return h, nil, f.damage(offset, "%v", err)
	}
	return h, raw, nil
}
