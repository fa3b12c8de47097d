package image

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Image is a complete image, open for reading. Its manifest is authentic, its files have the sizes that it says, and the
// directory of its index has been read. Everything else is checked when it is read. Safe for concurrent use, but Close.
type Image struct {
	repository *Repository
	keys       *derived
	manifest   Manifest
	digest     Digest
	dir        *os.Root
	index      *index
	files      opener

	mu     sync.Mutex
	data   []*sealedFile // by number; nil until first used
	hashes []*sealedFile // the same
}

// opener opens files of an image.
type opener struct {
	keys       *derived
	repository ID
	image      string
	encrypted  bool
}

// file opens a file and checks its size and its header.
func (o *opener) file(root *os.Root, prefix, name string, kind fileKind, n ID, size int64) (*sealedFile, error) {
	f, info, err := openRegular(root, prefix+name)
	if err != nil {
		return nil, readError(o.image, name, 0, err)
	}
	s, err := newSealer(o.keys, kind, n, o.encrypted)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("image %s: %w", o.image, err)
	}
	file := &sealedFile{sealer: s, image: o.image, name: name, file: f, size: size}
	if info.Size() != size {
		err = file.damage(min(size, info.Size()), "the file has %d bytes, not %d", info.Size(), size)
	} else {
		err = file.checkHeader(o.repository)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return file, nil
}

// index opens the index of an image.
func (o *opener) index(dir *os.Root, m *Manifest) (*index, error) {
	f, err := o.file(dir, "", indexName, indexFile, m.ID, m.Index.Bytes)
	if err != nil {
		return nil, err
	}
	reader := new(recordReader)
	defer reader.close()
	x, err := openIndex(reader, f, m.Index.Directory, m.Blocks, m.dataBounds())
	if err != nil {
		f.file.Close()
		return nil, err
	}
	return x, nil
}

// Open opens an image. The errors to act on are [ErrNotFound], [ErrWrongKey] and [*DamageError].
func (r *Repository) Open(ctx context.Context, name string) (*Image, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	dir, err := r.openImageDir(name)
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", name, notFound(err))
	}
	i, err := r.open(dir, name)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("open image: %w", err)
	}
	return i, nil
}

func (r *Repository) open(dir *os.Root, name string) (*Image, error) {
	m, digest, err := r.readManifest(dir, name)
	if err != nil {
		return nil, err
	}
	if err := m.checkEncryption(&r.keys); err != nil {
		return nil, err
	}
	keys := r.keys
	i := &Image{repository: r, keys: &keys, manifest: *m, digest: digest, dir: dir,
		data: make([]*sealedFile, len(m.Data)), hashes: make([]*sealedFile, len(m.Data))}
	i.files = opener{keys: &keys, repository: r.id, image: name, encrypted: m.Encrypted()}
	// A look at the sizes finds most of what a broken copy does to an image, at once and for nothing.
	for _, f := range i.allFiles() {
		info, err := dir.Lstat(f.name)
		switch {
		case err != nil:
			return nil, readError(name, f.name, 0, err)
		case !info.Mode().IsRegular():
			return nil, &DamageError{Image: name, File: f.name, Offset: 0, What: fmt.Sprintf("is no regular file (%v)", info.Mode().Type())}
		case info.Size() != f.Bytes:
			return nil, &DamageError{Image: name, File: f.name, Offset: min(info.Size(), f.Bytes),
				What: fmt.Sprintf("the file has %d bytes, not %d", info.Size(), f.Bytes)}
		}
	}
	i.index, err = i.files.index(dir, m)
	return i, err
}

// namedFile is a file of the image and what the manifest says of it.
type namedFile struct {
	name string
	kind fileKind
	id   ID
	FileInfo
}

func (i *Image) allFiles() []namedFile {
	m := &i.manifest
	list := []namedFile{{indexName, indexFile, m.ID, m.Index.FileInfo}, {stateName, stateFile, m.ID, m.DeviceState}}
	for _, f := range m.Data {
		list = append(list, namedFile{f.pagesName(), pagesFile, f.ID, f.Pages}, namedFile{f.hashesName(), hashesFile, f.ID, f.Hashes})
	}
	return list
}

// Close lets go of the image's files. Nothing may be reading it.
func (i *Image) Close() error {
	err := i.index.file.file.Close()
	for _, f := range slices.Concat(i.data, i.hashes) {
		if f != nil {
			err = errors.Join(err, f.file.Close())
		}
	}
	return errors.Join(err, i.dir.Close())
}

// Name is the image's name.
func (i *Image) Name() string { return i.manifest.Name }

// Manifest is what the image says of itself.
func (i *Image) Manifest() Manifest { return i.manifest }

// Digest is the digest of the image's manifest, and so, since that has the digests of all files, of the whole image.
func (i *Image) Digest() Digest { return i.digest }

// dataFile opens a file of page frames when it is first used.
func (i *Image) dataFile(n uint32) (*sealedFile, error) {
	f := &i.manifest.Data[n]
	return i.opened(&i.data[n], namedFile{f.pagesName(), pagesFile, f.ID, f.Pages})
}

// hashFile opens a file of page hashes when it is first used.
func (i *Image) hashFile(n uint32) (*sealedFile, error) {
	f := &i.manifest.Data[n]
	return i.opened(&i.hashes[n], namedFile{f.hashesName(), hashesFile, f.ID, f.Hashes})
}

func (i *Image) opened(file **sealedFile, f namedFile) (*sealedFile, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if *file != nil {
		return *file, nil
	}
	var err error
	*file, err = i.files.file(i.dir, "", f.name, f.kind, f.id, f.Bytes)
	return *file, err
}

// DeviceState returns the device state that the image was sealed with.
func (i *Image) DeviceState(ctx context.Context) ([]byte, error) {
	m := &i.manifest
	f, err := i.files.file(i.dir, "", stateName, stateFile, m.ID, m.DeviceState.Bytes)
	if err != nil {
		return nil, err
	}
	defer f.file.Close()
	reader := new(recordReader)
	defer reader.close()
	_, raw, err := reader.readRaw(f, stateRecord, fileHeaderBytes, f.size-fileHeaderBytes, maxRawBytes)
	return raw, err
}

// Extents yields what the image says of a block's pages, in order and without gaps. A second value that is not nil is the
// last.
func (i *Image) Extents(block int) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if block < 0 || block >= len(i.manifest.Blocks) {
			yield(Extent{}, fmt.Errorf("image %s: no block %d", i.manifest.Name, block))
			return
		}
		c := i.index.cursor()
		defer c.reader.close()
		for page := uint64(0); page < i.manifest.Blocks[block].pages(); {
			e, err := c.find(uint32(block), page)
			if err != nil {
				yield(Extent{}, err)
				return
			}
			page = e.end()
			if !yield(e.public(), nil) {
				return
			}
		}
	}
}

// ReadPage reads one page into dst, which has the size of one. Reading many pages this way is slow; see Load.
func (i *Image) ReadPage(block int, page uint64, dst []byte) error {
	blocks := i.manifest.Blocks
	if block < 0 || block >= len(blocks) || page >= blocks[block].pages() || len(dst) != pageset.PageBytes {
		return fmt.Errorf("image %s: no page %#x of block %d, or no room for one in %d bytes", i.manifest.Name, page, block, len(dst))
	}
	c := i.index.cursor()
	defer c.reader.close()
	e, err := c.find(uint32(block), page)
	if err != nil {
		return err
	}
	switch e.kind {
	case Uniform:
		fillWord(dst, e.word)
	case Stored:
		d := newFrameReader(i)
		defer d.close()
		raw := make([]byte, frameRawBytes)
		if err := d.read(e.frame, raw[:int(e.frame.pages)*pageset.PageBytes]); err != nil {
			return err
		}
		copy(dst, raw[(uint64(e.slot)+page-e.first)*pageset.PageBytes:])
	default:
		clear(dst)
	}
	return nil
}
