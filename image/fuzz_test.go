package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// The fuzz targets stand on every parser that reads a repository. Most of what they feed could never get past a tag or
// MAC; they go on as if it had, since a parser that is only safe behind a key is safe from nobody who has it.

// bytesFile is a file in memory.
type bytesFile struct{ *bytes.Reader }

func (bytesFile) Close() error { return nil }

func newBytesFile(s *sealer, content []byte) *sealedFile {
	return &sealedFile{sealer: s, image: "fuzzed", name: "file", file: bytesFile{bytes.NewReader(content)}, size: int64(len(content))}
}

func fuzzKeys() *derived {
	keys := derive(testKeys(false))
	return &keys
}

// addGolden gives a fuzz target a file of the golden repositories.
func addGolden(f *testing.F, pattern string) {
	paths, err := filepath.Glob(filepath.Join("testdata", "golden", "*", "images", "*", pattern))
	if err != nil || len(paths) == 0 {
		f.Fatal("no golden files", err)
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(content)
	}
}

func FuzzManifest(f *testing.F) {
	addGolden(f, manifestName)
	keys := fuzzKeys()
	f.Fuzz(func(t *testing.T, text []byte) {
		// The name and the repository are the manifest's own, so that not every input ends there.
		var m Manifest
		if json.Unmarshal(text, &m) != nil || CheckName(m.Name) != nil {
			return
		}
		mac := append([]byte(macMagic), keys.secretCheck(m.Repository)...)
		mac = append(mac, keyedHash(&keys.mac, macBytes, text)...)
		read, err := decodeManifest(keys, m.Repository, m.Name, text, mac)
		if err != nil {
			return
		}
		for _, d := range read.Data {
			if d.PagesInFile > 0 && d.Hashes.Bytes <= fileHeaderBytes {
				t.Fatalf("data file of %d pages without hashes", d.PagesInFile)
			}
		}
		if read.MemoryBytes() > maxMemoryBytes {
			t.Fatalf("%d bytes of memory", read.MemoryBytes())
		}
		again, mac, err := encodeManifest(keys, read)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeManifest(keys, m.Repository, m.Name, again, mac); err != nil {
			t.Fatalf("written again it is refused: %v", err)
		}
	})
}

func FuzzManifestMAC(f *testing.F) {
	addGolden(f, macName)
	keys := fuzzKeys()
	f.Fuzz(func(t *testing.T, mac []byte) {
		if _, err := decodeManifest(keys, ID{1}, "image", []byte("{}"), mac); err == nil {
			t.Fatal("accepted")
		}
	})
}

func FuzzRepositoryFile(f *testing.F) {
	f.Add([]byte(`{"format":"vmckpt repository","version":1,"id":"00112233445566778899aabbccddeeff"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if n, err := decodeRepository(text); err == nil && n == (ID{}) {
			t.Fatal("no id")
		}
	})
}

var (
	fuzzBlocks = []BlockInfo{{"ram", 1 << 30}, {"none", 0}, {"vga", 16 << 20}, {"rom", pageset.PageBytes}}
	fuzzData   = []dataBounds{{size: 1 << 40, pages: 1 << 28}, {size: 4096, pages: 20}}
)

func FuzzIndexSegment(f *testing.F) {
	c := newSegmentCoder(len(fuzzData))
	c.begin()
	raw := []byte{0, 0}
	for _, e := range []extent{
		{count: 100, kind: Evicted}, {count: 3, kind: Uniform, word: 77}, {count: 1, kind: Unpopulated},
		{count: 16, kind: Stored, frame: frame{pages: 16, stored: 5000, offset: 64}},
		{count: 2, slot: 4, kind: Stored, frame: frame{pages: 7, stored: 1000, offset: 64 + 5048, ordinal: 16}},
		{count: 1, kind: Stored, frame: frame{file: 1, pages: 1, stored: 100, offset: 500, ordinal: 19}},
	} {
		raw = c.encode(raw, &e)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > segmentRawBytes {
			return
		}
		coder := newSegmentCoder(len(fuzzData))
		extents, err := coder.decode(raw, fuzzBlocks, fuzzData, nil)
		for i, e := range extents {
			switch {
			case i > 0 && !(place{extents[i-1].block, extents[i-1].first}).before(place{e.block, e.first}):
				t.Fatalf("%+v out of order", e)
			case int(e.block) >= len(fuzzBlocks) || e.count == 0 || e.first >= fuzzBlocks[e.block].pages() || e.count > fuzzBlocks[e.block].pages()-e.first:
				t.Fatalf("%+v outside its block", e)
			case e.kind != Stored:
			case int(e.frame.file) >= len(fuzzData) || e.frame.offset < fileHeaderBytes || e.frame.end() > fuzzData[e.frame.file].size ||
				e.frame.ordinal+uint64(e.frame.pages) > fuzzData[e.frame.file].pages:
				t.Fatalf("%+v outside its file", e)
			case uint64(e.slot)+e.count > uint64(e.frame.pages) || e.frame.pages > framePages || e.frame.stored > frameRawBytes:
				t.Fatalf("%+v outside its frame", e)
			}
		}
		if err != nil || len(extents) == 0 {
			return
		}
		coder.begin()
		start := extents[0]
		again := []byte{}
		again = appendUvarints(again, uint64(start.block), start.first)
		for i := range extents {
			again = coder.encode(again, &extents[i])
		}
		reread, err := coder.decode(again, fuzzBlocks, fuzzData, nil)
		if err != nil || !reflect.DeepEqual(extents, reread) {
			t.Fatalf("written again it reads differently: %v\n%+v\n%+v", err, extents, reread)
		}
	})
}

func appendUvarints(dst []byte, values ...uint64) []byte {
	for _, v := range values {
		for ; v >= 0x80; v >>= 7 {
			dst = append(dst, byte(v)|0x80)
		}
		dst = append(dst, byte(v))
	}
	return dst
}

// FuzzIndex seals what it is given as an index's segment and directory, and reads it through.
func FuzzIndex(f *testing.F) {
	keys := fuzzKeys()
	f.Add([]byte{0, 0, 4, 8}, make([]byte, directoryEntryBytes))
	f.Fuzz(func(t *testing.T, segment, directory []byte) {
		s, err := newSealer(keys, indexFile, ID{1}, false)
		if err != nil {
			t.Fatal(err)
		}
		content := s.fileHeader(ID{2})
		seal := func(kind recordKind, payload []byte) int64 {
			at := int64(len(content))
			record := make([]byte, recordHeaderBytes)
			recordHeader{kind: kind, raw: uint32(len(payload)), stored: uint32(len(payload))}.encode(record)
			record = append(append(record, payload...), make([]byte, tagBytes)...)
			s.seal(record, at)
			content = append(content, record...)
			return at
		}
		seal(segmentRecord, segment)
		at := seal(directoryRecord, directory)
		x, err := openIndex(new(recordReader), newBytesFile(s, content), at, fuzzBlocks, fuzzData)
		if err != nil {
			return
		}
		c := x.cursor()
		c.find(0, 5)
		c.find(3, 0)
		all := c.all()
		for ok := true; ok && err == nil; {
			_, ok, err = all()
		}
	})
}

// FuzzRecord reads bytes that nobody sealed: every one is refused, whatever they say of their own length.
func FuzzRecord(f *testing.F) {
	addGolden(f, indexName)
	keys := fuzzKeys()
	f.Fuzz(func(t *testing.T, content []byte) {
		s, err := newSealer(keys, indexFile, ID{1}, false)
		if err != nil {
			t.Fatal(err)
		}
		file, reader := newBytesFile(s, content), new(recordReader)
		if file.checkHeader(ID{2}) == nil {
			t.Fatal("a file header that nobody wrote")
		}
		if len(content) < fileHeaderBytes+recordHeaderBytes {
			return
		}
		length := decodeRecordHeader(content[fileHeaderBytes:]).total()
		if _, _, err := reader.read(file, segmentRecord, fileHeaderBytes, length); err == nil {
			t.Fatal("a record that nobody sealed")
		}
	})
}

// FuzzFrame seals a frame with any header and payload, and reads it by any entry of an index: it is read as what the index and the header
// say, or refused.
func FuzzFrame(f *testing.F) {
	c, err := newCompressor(Zstd)
	if err != nil {
		f.Fatal(err)
	}
	page := append(bytes.Repeat([]byte("page "), 100), make([]byte, 2*pageset.PageBytes-500)...)
	byZstd, _ := c.append(nil, page)
	c, _ = newCompressor(S2)
	byS2, _ := c.append(nil, page)
	for how, payload := range map[Compression][]byte{Zstd: byZstd, S2: byS2, None: page} {
		f.Add(uint8(how), uint8(2), uint32(len(page)), uint8(7), payload, uint8(2), uint8(7))
		f.Add(uint8(how), uint8(2), uint32(len(page)), uint8(7), payload, uint8(3), uint8(7))
		f.Add(uint8(how), uint8(2), uint32(len(page)), uint8(7), payload, uint8(2), uint8(8))
		f.Add(uint8(how), uint8(1), uint32(pageset.PageBytes), uint8(0), payload, uint8(1), uint8(0))
	}
	keys := fuzzKeys()
	f.Fuzz(func(t *testing.T, how, items uint8, raw uint32, first uint8, payload []byte, pages, ordinal uint8) {
		s, err := newSealer(keys, pagesFile, ID{1}, false)
		if err != nil {
			t.Fatal(err)
		}
		reader := new(recordReader)
		defer reader.close()
		content := s.fileHeader(ID{2})
		record := make([]byte, recordHeaderBytes)
		header := recordHeader{
			kind: frameRecord, compression: Compression(how), items: items, raw: raw, stored: uint32(len(payload)), first: uint64(first),
		}
		header.encode(record)
		record = append(append(record, payload...), make([]byte, tagBytes)...)
		s.seal(record, fileHeaderBytes)
		file := newBytesFile(s, append(content, record...))
		decoded, sound := decodedBy(header.compression, payload)
		sound = sound && len(decoded) == int(raw) && len(payload) <= len(decoded) && (how == uint8(None)) == (len(payload) == len(decoded))

		frames := &frameReader{reader: reader, file: func(uint32) (*sealedFile, error) { return file, nil }}
		const guard = 0xa5
		room := bytes.Repeat([]byte{guard}, frameRawBytes+pageset.PageBytes)
		pages = min(max(pages, 1), framePages) // as decoding an index makes sure
		n := int(pages) * pageset.PageBytes
		err = frames.read(frame{pages: pages, stored: uint32(len(payload)), offset: fileHeaderBytes, ordinal: uint64(ordinal)}, room[:n])
		if !bytes.Equal(room[n:n+pageset.PageBytes], bytes.Repeat([]byte{guard}, pageset.PageBytes)) {
			t.Fatal("wrote behind the frame")
		}
		checkRead(t, err, sound && items == pages && first == ordinal && int(raw) == n, room[:n], decoded)

		if raw <= maxRawBytes/64 {
			_, got, err := reader.readRaw(file, frameRecord, fileHeaderBytes, int64(len(record)), maxRawBytes)
			checkRead(t, err, sound, got, decoded)
		}
	})
}

// checkRead judges what came of reading a record that is, or is not, what it should be.
func checkRead(t *testing.T, err error, sound bool, got, want []byte) {
	t.Helper()
	var damage *DamageError
	switch {
	case err != nil && !errors.As(err, &damage):
		t.Fatalf("refused by another error than that it is damaged: %v", err)
	case err != nil && sound:
		t.Fatalf("a sound record is refused: %v", err)
	case err == nil && !sound:
		t.Fatal("read, and it is not what it should be")
	case err == nil && !bytes.Equal(got, want):
		t.Fatal("read as something else")
	}
}

// decodedBy decompresses a payload with the compressor's library alone, to whatever length that gives.
func decodedBy(how Compression, payload []byte) ([]byte, bool) {
	switch how {
	case None:
		return payload, true
	case Zstd:
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxRawBytes))
		if err != nil {
			return nil, false
		}
		defer d.Close()
		decoded, err := d.DecodeAll(payload, nil)
		return decoded, err == nil
	case S2:
		if n, err := s2.DecodedLen(payload); err != nil || n > maxRawBytes {
			return nil, false
		}
		decoded, err := s2.Decode(nil, payload)
		return decoded, err == nil
	}
	return nil, false
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte("# keys\nsecret 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"))
	f.Fuzz(func(t *testing.T, text []byte) { ParseKeys(text) })
}
