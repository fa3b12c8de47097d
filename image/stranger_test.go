package image_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/minio/highwayhash"
	"github.com/zeebo/blake3"
)

// This is a second reader, written from docs/image-format.md and nothing else: it shares no code with the package. It is slow,
// holds everything in memory and gives up at the first thing that is not as the document says.

// strangeImage is an image as the stranger sees it.
type strangeImage struct {
	blocks map[string][]byte // content by block name
	kinds  map[string][]byte // of each page: 'u'npopulated, 'e'victed, 'w'ord, 's'tored
	state  []byte
}

type stranger struct {
	secret, encryption []byte
	repository         []byte
	dir                string
	encrypted          bool
}

// must gives up.
func must(ok bool, what string, args ...any) {
	if !ok {
		panic(fmt.Errorf(what, args...))
	}
}

func try[T any](v T, err error) T {
	must(err == nil, "%v", err)
	return v
}

func strangeDerive(context string, material []byte) []byte {
	out := make([]byte, 32)
	blake3.DeriveKey(context, material, out)
	return out
}

func strangeKeyed(key []byte, n int, data ...[]byte) []byte {
	h := try(blake3.NewKeyed(key))
	h.Write(bytes.Join(data, nil))
	return h.Sum(nil)[:n]
}

func (s *stranger) tagKey() []byte {
	return strangeDerive("vmckpt.io 2026 image v1 record tag", s.secret)
}
func (s *stranger) aeadKey() []byte {
	return strangeDerive("vmckpt.io 2026 image v1 record encryption", append(bytes.Clone(s.secret), s.encryption...))
}

// strangeManifest has the members that a reader needs.
type strangeManifest struct {
	Format     string
	Version    int
	Repository string
	ID         string
	Name       string
	Blocks     []struct {
		Name  string
		Bytes uint64
	}
	Encryption         string
	EncryptionKeyCheck string
	Index              struct {
		strangeFile
		Extents   uint64
		Directory uint64
	}
	DeviceState strangeFile
	Data        []struct {
		ID           string
		PagesInFile  uint64
		PagesUsed    uint64
		Pages        strangeFile
		Hashes       strangeFile
		HolesBetween bool
	}
	Pages struct{ Total, Unpopulated, Evicted, Uniform, Stored uint64 }
}

type strangeFile struct {
	Bytes  int
	Digest string
}

// readStrangely reads an image of a repository.
func readStrangely(repository, name string, secret, encryption []byte) (image *strangeImage, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	s := &stranger{secret: secret, encryption: encryption, dir: filepath.Join(repository, "images", name)}
	var repo struct {
		Format  string
		Version int
		ID      string
	}
	must(json.Unmarshal(try(os.ReadFile(filepath.Join(repository, "repository.json"))), &repo) == nil, "repository.json")
	must(repo.Format == "vmckpt repository" && repo.Version == 1, "repository format")
	s.repository = try(hex.DecodeString(repo.ID))

	mac := try(os.ReadFile(filepath.Join(s.dir, "manifest.mac")))
	text := try(os.ReadFile(filepath.Join(s.dir, "manifest.json")))
	must(len(mac) == 56 && string(mac[:8]) == "VMCKMAC1", "manifest.mac")
	check := strangeKeyed(strangeDerive("vmckpt.io 2026 image v1 key check", secret), 16, []byte("secret"), s.repository)
	must(bytes.Equal(mac[8:24], check), "secret check")
	must(bytes.Equal(mac[24:], strangeKeyed(strangeDerive("vmckpt.io 2026 image v1 manifest MAC", secret), 32, text)), "MAC")

	var m strangeManifest
	must(json.Unmarshal(text, &m) == nil, "manifest.json")
	must(m.Format == "vmckpt image" && m.Version == 1 && m.Name == name && m.Repository == repo.ID, "manifest")
	if s.encrypted = m.Encryption == "aes-256-gcm"; s.encrypted {
		check := strangeKeyed(s.aeadKey(), 16, []byte("encryption"), s.repository)
		must(m.EncryptionKeyCheck == hex.EncodeToString(check), "encryption check")
	}
	return s.read(&m), nil
}

// file reads a file whole and checks size, digest and file header.
func (s *stranger) file(name string, want strangeFile, kind, id string) []byte {
	content := try(os.ReadFile(filepath.Join(s.dir, name)))
	must(len(content) == want.Bytes, "%s: size", name)
	sum := highwayhash.Sum(content, strangeDerive("vmckpt.io 2026 image v1 file digest", s.secret))
	must(hex.EncodeToString(sum[:]) == want.Digest, "%s: digest", name)
	head := append([]byte("VMCKPT01"), kind...)
	if s.encrypted {
		head = append(head, 1, 0, 0, 0)
	} else {
		head = append(head, 0, 0, 0, 0)
	}
	head = append(head, try(hex.DecodeString(id))...)
	head = append(head, s.repository...)
	head = append(head, strangeKeyed(s.tagKey(), 16, head)...)
	must(bytes.Equal(content[:64], head), "%s: header", name)
	return content
}

// strangeRecord is a record, its payload decrypted and decompressed.
type strangeRecord struct {
	kind          string
	items         int
	number, first uint64
	payload       []byte
	end           uint64
	stored        uint64
}

func (s *stranger) record(content []byte, offset uint64, fileKind, id string) strangeRecord {
	le := binary.LittleEndian
	head := content[offset:][:32]
	raw, stored := le.Uint32(head[8:]), uint64(le.Uint32(head[12:]))
	payload := bytes.Clone(content[offset+32:][:stored])
	tag := content[offset+32+stored:][:16]
	idBytes := try(hex.DecodeString(id))
	key := s.tagKey()
	if s.encrypted {
		key = s.aeadKey()
	}
	gcm := try(cipher.NewGCM(try(aes.NewCipher(strangeKeyed(key, 32, []byte(fileKind), idBytes)))))
	nonce := append(le.AppendUint64(nil, offset), 0, 0, 0, 0)
	if s.encrypted {
		payload = try(gcm.Open(nil, nonce, append(payload, tag...), head))
	} else {
		try(gcm.Open(nil, nonce, tag, content[offset:][:32+stored]))
	}
	must(head[6] == 0 && head[7] == 0 && (head[4] == 0) == (uint64(raw) == stored) && stored <= uint64(raw), "record header at %d", offset)
	switch head[4] {
	case 1:
		payload = try(try(zstd.NewReader(nil)).DecodeAll(payload, nil))
	case 2:
		payload = try(s2.Decode(nil, payload))
	default:
		must(head[4] == 0, "compression")
	}
	must(len(payload) == int(raw), "raw length at %d", offset)
	return strangeRecord{string(head[:4]), int(head[5]), le.Uint64(head[16:]), le.Uint64(head[24:]), payload, offset + 48 + stored, stored}
}

func (s *stranger) read(m *strangeManifest) *strangeImage {
	image := &strangeImage{blocks: map[string][]byte{}, kinds: map[string][]byte{}}
	for _, b := range m.Blocks {
		image.blocks[b.Name] = make([]byte, b.Bytes)
		image.kinds[b.Name] = make([]byte, b.Bytes/4096)
	}
	pages, hashes := make([][]byte, len(m.Data)), make([][]byte, len(m.Data))
	for i, d := range m.Data {
		pages[i] = s.file(d.ID+".pages", d.Pages, "PAGE", d.ID)
		hashes[i] = s.file(d.ID+".hashes", d.Hashes, "HASH", d.ID)
	}
	content := s.file("index", m.Index.strangeFile, "INDX", m.ID)
	directory := s.record(content, m.Index.Directory, "INDX", m.ID)
	must(directory.kind == "IDIR" && directory.end == uint64(len(content)) && directory.first == m.Index.Extents, "directory")

	type state struct{ offset, ordinal uint64 }
	var extents, block, page uint64
	used := make([]uint64, len(m.Data))
	var counts [4]uint64
	at := uint64(64)
	for n := uint64(0); at < m.Index.Directory; n++ {
		segment := s.record(content, at, "INDX", m.ID)
		must(segment.kind == "INDX" && segment.number == n && segment.first == extents && len(segment.payload) <= 262144, "segment %d", n)
		entry := directory.payload[n*24:][:24]
		le := binary.LittleEndian
		must(le.Uint64(entry) == at && uint64(le.Uint32(entry[8:])) == segment.end-at, "directory entry %d", n)
		at = segment.end

		p := bytes.NewReader(segment.payload)
		for block < uint64(len(m.Blocks)) && page == m.Blocks[block].Bytes/4096 {
			block, page = block+1, 0
		}
		must(try(binary.ReadUvarint(p)) == block && try(binary.ReadUvarint(p)) == page, "beginning of segment %d", n)
		must(uint64(le.Uint32(entry[12:])) == block && le.Uint64(entry[16:]) == page, "directory entry %d", n)
		next := make([]state, len(m.Data))
		for p.Len() > 0 {
			for page == m.Blocks[block].Bytes/4096 {
				block, page = block+1, 0
			}
			v := try(binary.ReadUvarint(p))
			count, kind := v/4, v%4
			name := m.Blocks[block].Name
			to := image.blocks[name][page*4096:][:count*4096]
			for i := range count {
				image.kinds[name][page+i] = "uews"[kind]
			}
			counts[kind] += count
			switch kind {
			case 2:
				var word [8]byte
				must(try(p.Read(word[:])) == 8, "word")
				copy(to, bytes.Repeat(word[:], len(to)/8))
			case 3:
				f := try(binary.ReadUvarint(p))
				offset := next[f].offset + uint64(try(binary.ReadVarint(p)))
				stored := try(binary.ReadUvarint(p))
				in, slot := try(p.ReadByte()), try(p.ReadByte())
				ordinal := next[f].ordinal + uint64(try(binary.ReadVarint(p)))
				next[f] = state{offset + 48 + stored, ordinal + uint64(in)}

				id := m.Data[f].ID
				frame := s.record(pages[f], offset, "PAGE", id)
				must(frame.kind == "PAGE" && frame.items == int(in) && frame.first == ordinal && frame.stored == stored &&
					len(frame.payload) == int(in)*4096 && uint64(slot)+count <= uint64(in), "frame at %d", offset)
				copy(to, frame.payload[int(slot)*4096:])
				used[f] += count

				for i := range count {
					ordinal := ordinal + uint64(slot) + i
					must(ordinal < m.Data[f].PagesInFile, "ordinal")
					record := s.record(hashes[f], 64+ordinal/256*4144, "HASH", id)
					must(record.kind == "HASH" && record.number == ordinal/256 && record.first == ordinal/256*256, "hashes")
					hash := highwayhash.Sum128(to[i*4096:][:4096], strangeDerive("vmckpt.io 2026 image v1 page hash", s.secret))
					must(bytes.Equal(record.payload[ordinal%256*16:][:16], hash[:]), "hash of page with ordinal %d", ordinal)
				}
			}
			page += count
			extents++
		}
	}
	for block < uint64(len(m.Blocks)) && page == m.Blocks[block].Bytes/4096 {
		block, page = block+1, 0
	}
	must(block == uint64(len(m.Blocks)) && extents == m.Index.Extents, "the index ends early")
	must(counts == [4]uint64{m.Pages.Unpopulated, m.Pages.Evicted, m.Pages.Uniform, m.Pages.Stored} &&
		counts[0]+counts[1]+counts[2]+counts[3] == m.Pages.Total, "counts")
	for i, d := range m.Data {
		must(used[i] == d.PagesUsed, "pages used of %s", d.ID)
	}
	content = s.file("device-state", m.DeviceState, "STAT", m.ID)
	devices := s.record(content, 64, "STAT", m.ID)
	must(devices.kind == "STAT" && devices.end == uint64(len(content)), "device state")
	image.state = devices.payload
	return image
}
