package image

import (
	"bytes"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"
	"unicode/utf8"

	"github.com/zeebo/blake3"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Bounds on what a manifest may say. They keep what a reader takes memory for small, whoever wrote the manifest.
const (
	manifestLimit    = 8 << 20 // bytes
	maxBlocks        = 4096
	maxBlockName     = 255     // bytes; QEMU's own bound on a RAM block's name (RAMBlock.idstr)
	maxMemoryBytes   = 1 << 52 // all blocks together
	maxDataFiles     = 512     // each is open twice while an image is loaded
	formatName       = "vmckpt image"
	formatVersion    = 1
	repositoryFormat = "vmckpt repository"
)

// The files of an image, beside its data files.
const (
	manifestName = "manifest.json"
	macName      = "manifest.mac"
	indexName    = "index"
	stateName    = "device-state"
)

// BlockInfo is one block of memory: a RAM block of QEMU's.
type BlockInfo struct {
	Name  string `json:"name"`
	Bytes uint64 `json:"bytes"` // a multiple of the page size; may be 0
}

func (b BlockInfo) pages() uint64 { return b.Bytes / pageset.PageBytes }

// Digest is 256 bits that stand for the bytes of a file: of a manifest BLAKE3, of all other files HighwayHash-256 under the repository's
// key for it, which costs a third of it where every byte goes through.
type Digest [32]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText writes hexadecimal digits.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads hexadecimal digits.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(d)) {
		return fmt.Errorf("digest of %d characters, want %d", len(text), hex.EncodedLen(len(d)))
	}
	_, err := hex.Decode(d[:], text)
	return err
}

// FileInfo is what a manifest says of a file.
type FileInfo struct {
	Bytes  int64  `json:"bytes"`
	Digest Digest `json:"digest"`
}

// DataFile is a file of page frames and the file of its pages' hashes. In an image's directory their names are the ID
// followed by .pages and .hashes.
type DataFile struct {
	ID           ID       `json:"id"` // of the image that the file was first written for
	PagesInFile  uint64   `json:"pagesInFile"`
	PagesUsed    uint64   `json:"pagesUsed"` // by this image
	Pages        FileInfo `json:"pages"`
	Hashes       FileInfo `json:"hashes"`
	HolesBetween bool     `json:"holesBetween,omitempty"` // a copy with only the frames that are used
}

func (f *DataFile) pagesName() string  { return f.ID.String() + ".pages" }
func (f *DataFile) hashesName() string { return f.ID.String() + ".hashes" }

// ParentInfo names the image that an increment was made on. It is history: nothing is read from the parent any more.
type ParentInfo struct {
	Name   string `json:"name"`
	Digest Digest `json:"digest"` // of the parent's manifest.json
}

// IndexInfo is the index's file and where its directory stands in it.
type IndexInfo struct {
	FileInfo
	Extents   uint64 `json:"extents"`
	Directory int64  `json:"directory"` // byte
}

// PageCounts counts the pages of an image, by where their content is: Total is the sum of Unpopulated, Evicted, Uniform
// and Stored.
type PageCounts struct {
	Total       uint64 `json:"total"`
	Unpopulated uint64 `json:"unpopulated"`
	Evicted     uint64 `json:"evicted"`
	Uniform     uint64 `json:"uniform"`
	Stored      uint64 `json:"stored"`
	// Inherited of Total are the parent's, whatever their kind.
	Inherited uint64 `json:"inherited"`
	// Unchanged counts the pages that were submitted and turned out to be the parent's.
	Unchanged uint64 `json:"unchanged"`
	// Written counts the pages that were put into this image's own data file, superseded ones too. Rewritten of them are the
	// parent's, stored anew so that a data file of it is needed no more.
	Written      uint64 `json:"written"`
	Rewritten    uint64 `json:"rewritten"`
	WrittenRaw   int64  `json:"writtenRawBytes"`    // before compression
	WrittenBytes int64  `json:"writtenStoredBytes"` // in the file
}

// Manifest is what an image says of itself. Treat what is behind its slices and maps as read-only.
type Manifest struct {
	Format     string      `json:"format"`
	Version    int         `json:"version"`
	Repository ID          `json:"repository"`
	ID         ID          `json:"id"`
	Name       string      `json:"name"`
	Created    time.Time   `json:"created"`
	Parent     *ParentInfo `json:"parent,omitempty"`
	Blocks     []BlockInfo `json:"blocks"`

	// Machine, Attributes and Report are the caller's, kept as they are.
	Machine    json.RawMessage   `json:"machine,omitempty"`    // the machine that the memory belongs to
	Attributes map[string]string `json:"attributes,omitempty"` // labels and the like
	Report     json.RawMessage   `json:"report,omitempty"`     // times and pauses of the capture

	Compression Compression `json:"compression"`
	Encryption  string      `json:"encryption"` // "none" or "aes-256-gcm"
	KeyCheck    string      `json:"encryptionKeyCheck,omitempty"`

	Index       IndexInfo  `json:"index"`
	DeviceState FileInfo   `json:"deviceState"`
	Data        []DataFile `json:"data"`
	Pages       PageCounts `json:"pages"`
}

const (
	encryptionNone = "none"
	encryptionAES  = "aes-256-gcm"
)

// Encrypted reports whether the image's files are encrypted.
func (m *Manifest) Encrypted() bool { return m.Encryption != encryptionNone }

// MemoryBytes is the size of all blocks together.
func (m *Manifest) MemoryBytes() uint64 {
	var sum uint64
	for _, b := range m.Blocks {
		sum += b.Bytes
	}
	return sum
}

// OwnBytes is how much the image's directory holds that no other image had before it. For an increment, the rest of
// FileBytes is shared with its ancestors, as long as they exist.
func (m *Manifest) OwnBytes() int64 {
	sum := m.Index.Bytes + m.DeviceState.Bytes
	for _, f := range m.Data {
		if f.ID == m.ID {
			sum += f.Pages.Bytes + f.Hashes.Bytes
		}
	}
	return sum
}

// FileBytes is the size of all the image's files, the manifest itself left out.
func (m *Manifest) FileBytes() int64 {
	sum := m.Index.Bytes + m.DeviceState.Bytes
	for _, f := range m.Data {
		sum += f.Pages.Bytes + f.Hashes.Bytes
	}
	return sum
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,126}[a-z0-9])?$`)

// CheckName returns an error if name cannot be an image's.
func CheckName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("image name %q: want up to 128 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit", name)
	}
	return nil
}

func checkBlocks(blocks []BlockInfo) error {
	if len(blocks) > maxBlocks {
		return fmt.Errorf("%d blocks, more than %d", len(blocks), maxBlocks)
	}
	seen := make(map[string]bool, len(blocks))
	var sum uint64
	for i, b := range blocks {
		switch {
		case b.Name == "" || len(b.Name) > maxBlockName:
			return fmt.Errorf("block %d has a name of %d bytes, want 1 to %d", i, len(b.Name), maxBlockName)
		case !utf8.ValidString(b.Name):
			return fmt.Errorf("block %d has a name that is not UTF-8: %q", i, b.Name) // JSON would have another in its place
		case seen[b.Name]:
			return fmt.Errorf("two blocks are named %q", b.Name)
		case b.Bytes%pageset.PageBytes != 0:
			return fmt.Errorf("block %q has %d bytes, not a multiple of %d", b.Name, b.Bytes, pageset.PageBytes)
		case b.Bytes > maxMemoryBytes-sum:
			return fmt.Errorf("more than %d bytes of memory", uint64(maxMemoryBytes))
		}
		seen[b.Name] = true
		sum += b.Bytes
	}
	return nil
}

// check makes sure that what the manifest says can be, before anything is done by it. The bytes were authentic already;
// what is checked here keeps a mistake, or an image from a later version, from being taken for something else.
func (m *Manifest) check() error {
	if m.Format != formatName || m.Version != formatVersion {
		return fmt.Errorf("format %q version %d, this reader knows %q version %d", m.Format, m.Version, formatName, formatVersion)
	}
	if err := CheckName(m.Name); err != nil {
		return err
	}
	if err := checkBlocks(m.Blocks); err != nil {
		return err
	}
	if m.Encryption != encryptionNone && m.Encryption != encryptionAES {
		return fmt.Errorf("unknown encryption %q", m.Encryption)
	}
	if m.Index.Directory < fileHeaderBytes || m.Index.Directory > m.Index.Bytes-recordOverhead {
		return fmt.Errorf("index of %d bytes with a directory at %d", m.Index.Bytes, m.Index.Directory)
	}
	if m.DeviceState.Bytes < fileHeaderBytes+recordOverhead || m.DeviceState.Bytes > fileHeaderBytes+recordOverhead+maxRawBytes {
		return fmt.Errorf("device state of %d bytes", m.DeviceState.Bytes)
	}
	if len(m.Data) > maxDataFiles {
		return fmt.Errorf("%d data files, more than %d", len(m.Data), maxDataFiles)
	}
	seen := make(map[ID]bool, len(m.Data))
	for _, f := range m.Data {
		switch {
		case seen[f.ID]:
			return fmt.Errorf("data file %s twice", f.ID)
		case f.Pages.Bytes < fileHeaderBytes || f.PagesInFile > maxMemoryBytes:
			return fmt.Errorf("data file %s of %d bytes and %d pages", f.ID, f.Pages.Bytes, f.PagesInFile)
		case f.Hashes.Bytes != hashesFileBytes(f.PagesInFile):
			return fmt.Errorf("data file %s has %d pages and %d bytes of hashes", f.ID, f.PagesInFile, f.Hashes.Bytes)
		}
		seen[f.ID] = true
	}
	return nil
}

func (m *Manifest) dataBounds() []dataBounds {
	bounds := make([]dataBounds, len(m.Data))
	for i, f := range m.Data {
		bounds[i] = dataBounds{size: f.Pages.Bytes, pages: f.PagesInFile}
	}
	return bounds
}

// manifest.mac: magic, key check, MAC.
const (
	macMagic     = "VMCKMAC1"
	macBytes     = 32
	macFileBytes = len(macMagic) + keyCheckBytes + macBytes
)

// encodeManifest returns the bytes of manifest.json and manifest.mac.
func encodeManifest(keys *derived, m *Manifest) (manifest, mac []byte, err error) {
	manifest, err = json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, nil, fmt.Errorf("encode manifest: %w", err)
	}
	manifest = append(manifest, '\n')
	if len(manifest) > manifestLimit {
		return nil, nil, fmt.Errorf("the manifest has %d bytes, more than %d", len(manifest), manifestLimit)
	}
	mac = append([]byte(macMagic), keys.secretCheck(m.Repository)...)
	return manifest, append(mac, keyedHash(&keys.mac, macBytes, manifest)...), nil
}

// decodeManifest checks the MAC first and looks into the manifest only then. The errors are [ErrWrongKey] and
// [*DamageError].
func decodeManifest(keys *derived, repository ID, name string, manifest, mac []byte) (*Manifest, error) {
	damage := func(file string, offset int64, what string, args ...any) error {
		return &DamageError{Image: name, File: file, Offset: offset, What: fmt.Sprintf(what, args...)}
	}
	if len(mac) != macFileBytes {
		return nil, damage(macName, int64(min(len(mac), macFileBytes)), "has %d bytes, not %d", len(mac), macFileBytes)
	}
	if i := mismatch(mac[:len(macMagic)], []byte(macMagic)); i >= 0 {
		return nil, damage(macName, int64(i), "does not begin as it must")
	}
	check, sum := mac[len(macMagic):len(macMagic)+keyCheckBytes], mac[len(macMagic)+keyCheckBytes:]
	ours := mismatch(check, keys.secretCheck(repository)) < 0
	valid := subtle.ConstantTimeCompare(sum, keyedHash(&keys.mac, macBytes, manifest)) == 1
	switch {
	case !valid && !ours:
		// Both wrong: another key, unless somebody damaged both.
		return nil, fmt.Errorf("image %s was %w: the key file has another secret", name, ErrWrongKey)
	case !valid:
		return nil, damage(manifestName, -1, "its MAC does not match (or %s is what is damaged)", macName)
	}
	m := new(Manifest)
	d := json.NewDecoder(bytes.NewReader(manifest))
	d.DisallowUnknownFields()
	err := d.Decode(m)
	// The secret is ours and so is the manifest. If the key check fits the repository that the manifest names, nothing is damaged.
	if !ours && err == nil && mismatch(check, keys.secretCheck(m.Repository)) < 0 {
		return nil, damage(manifestName, -1, "it is an image of repository %s, and this is %s: the image was moved here, or %s was changed",
			m.Repository, repository, repositoryName)
	}
	if !ours {
		return nil, damage(macName, int64(len(macMagic)), "the key check does not match, the MAC does")
	}
	if err != nil {
		return nil, damage(manifestName, d.InputOffset(), "%v", err)
	}
	if err := m.check(); err != nil {
		return nil, damage(manifestName, -1, "%v", err)
	}
	if m.Name != name {
		return nil, damage(manifestName, -1, "is the manifest of image %s", m.Name)
	}
	if m.Repository != repository {
		return nil, damage(manifestName, -1, "belongs to repository %s, this is %s", m.Repository, repository)
	}
	return m, nil
}

// checkEncryption makes sure that the keys can decrypt the image.
func (m *Manifest) checkEncryption(keys *derived) error {
	if !m.Encrypted() {
		return nil
	}
	if keys.aead == nil {
		return fmt.Errorf("image %s was %w: it is encrypted, and the key file has no encryption key", m.Name, ErrWrongKey)
	}
	if m.KeyCheck != hex.EncodeToString(keys.encryptionCheck(m.Repository)) {
		return fmt.Errorf("image %s was %w: the key file has another encryption key", m.Name, ErrWrongKey)
	}
	return nil
}

// mismatch returns where a and b, of equal length, differ first, or -1.
func mismatch(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func manifestDigest(manifest []byte) Digest { return Digest(blake3.Sum256(manifest)) }

// repositoryInfo is the content of repository.json.
type repositoryInfo struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	ID      ID     `json:"id"`
}

func decodeRepository(text []byte) (ID, error) {
	var info repositoryInfo
	if err := json.Unmarshal(text, &info); err != nil {
		return ID{}, err
	}
	if info.Format != repositoryFormat || info.Version != formatVersion {
		return ID{}, fmt.Errorf("format %q version %d, this program knows %q version %d", info.Format, info.Version, repositoryFormat, formatVersion)
	}
	if info.ID == (ID{}) {
		return ID{}, errors.New("no repository id")
	}
	return info.ID, nil
}
