package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
)

// parent is what a writer keeps of the image it makes an increment on: its index, and its data files, every one of which is
// a hard link in the writer's own directory or, where links cannot be had, open until the frames in use have been copied.
type parent struct {
	info     ParentInfo
	manifest *Manifest
	writer   *Writer
	path     string   // of the parent's directory, beneath the repository
	dir      *os.Root // the parent's directory
	inUse    *os.File // copying only: locked, so that the parent is not deleted before the copy is made
	linked   bool
	index    *index
	files    []*parentFile

	submitted places // in files that are being rewritten
}

type parentFile struct {
	DataFile
	hashFile *sealedFile
	pageFile *sealedFile // open where frames are read from it: copying, or to be rewritten
	rewrite  bool        // its pages go into the writer's own data file
	copy     *frameCopy  // copying only; nil until a frame is needed
}

// checkParent refuses a parent that the image cannot be made on.
func (w *Writer) checkParent() error {
	p := w.spec.Parent
	m := &p.manifest
	refuse := func(reason string, args ...any) error {
		return &ParentError{Parent: m.Name, Reason: fmt.Sprintf(reason, args...)}
	}
	switch {
	case m.Repository != w.repository.id:
		return refuse("it is in repository %s, this is %s", m.Repository, w.repository.id)
	case m.Encrypted() != w.encrypted:
		return refuse("its encryption is %q, and an image is encrypted wholly or not at all", m.Encryption)
	case !slices.Equal(m.Blocks, w.spec.Blocks):
		return refuse("its memory is laid out differently (%s)", layoutDifference(m.Blocks, w.spec.Blocks))
	case len(m.Data) >= maxDataFiles && w.spec.RewriteBytes == 0:
		return refuse("it is made of %d data files, no image can have more, and none may be rewritten", len(m.Data))
	}
	w.parent = &parent{
		info:     ParentInfo{Name: m.Name, Digest: p.digest},
		manifest: m,
		writer:   w,
		path:     imagePath(m.Name),
	}
	return nil
}

// take links the parent's data files into the writer's directory and opens its index. The repository's lock is held, so that the
// parent is not deleted meanwhile; afterwards it may be.
func (p *parent) take(w *Writer) error {
	r := w.repository
	refuse := func(err error) error {
		return &ParentError{Parent: p.info.Name, Reason: "it is not what it was when it was opened", Err: notFoundWith(err)}
	}
	var err error
	if p.dir, err = r.openImageDir(p.info.Name); err != nil {
		return refuse(err)
	}
	// Under its name there has to be that image still, and not another that came in its place.
	if _, digest, err := r.readManifest(p.dir, p.info.Name); err != nil {
		return refuse(err)
	} else if digest != p.info.Digest {
		return refuse(errors.New("another image has its name now"))
	}
	for i := range p.manifest.Data {
		p.files = append(p.files, &parentFile{DataFile: p.manifest.Data[i]})
	}
	if p.index, err = p.opener().index(p.dir, p.manifest); err != nil {
		return p.damaged(err)
	}
	p.linked = true
	for _, f := range p.files {
		for _, name := range []string{f.pagesName(), f.hashesName()} {
			err := r.disk.link(p.path+"/"+name, w.stage(name))
			switch {
			case err == nil:
			case noLinks(err):
				return p.takeCopies(w)
			case errors.Is(err, fs.ErrNotExist):
				return refuse(&DamageError{Image: p.info.Name, File: name, Offset: 0, What: "is missing"})
			default:
				return fmt.Errorf("link %s of the parent: %w", name, err)
			}
		}
	}
	return nil
}

// takeCopies goes back on the links that were made and arranges for copying.
func (p *parent) takeCopies(w *Writer) error {
	p.linked = false
	for _, f := range p.files {
		for _, name := range []string{f.pagesName(), f.hashesName()} {
			if err := gone(w.repository.disk.remove(w.stage(name))); err != nil {
				return fmt.Errorf("remove a link: %w", err)
			}
		}
	}
	var err error
	if p.inUse, _, err = openRegular(p.dir, macName); err != nil {
		return p.damaged(readError(p.info.Name, macName, 0, err))
	}
	if free, err := tryLock(p.inUse, false); err != nil {
		return err
	} else if !free {
		return &ParentError{Parent: p.info.Name, Reason: "it is being deleted"}
	}
	return nil
}

// open opens the data files that were taken and reads the index through, so that a damaged one is found out before any page is read.
func (p *parent) open(ctx context.Context) error {
	p.chooseRewrites(p.writer.spec.RewriteBytes)
	return p.damaged(p.openFiles(ctx))
}

// damaged makes a [*ParentError] of damage found in the parent.
func (p *parent) damaged(err error) error {
	if damage := new(DamageError); errors.As(err, &damage) {
		return &ParentError{Parent: p.info.Name, Reason: "it is damaged", Err: err}
	}
	return err
}

func (p *parent) opener() *opener {
	r := p.writer.repository
	return &opener{keys: &r.keys, repository: r.id, image: p.info.Name, encrypted: p.manifest.Encrypted()}
}

func (p *parent) openFiles(ctx context.Context) error {
	r := p.writer.repository
	from := p.opener()
	var err error
	for _, f := range p.files {
		root, prefix := p.dir, ""
		if p.linked {
			root, prefix = r.root, p.writer.stage("")+"/"
		}
		if f.hashFile, err = from.file(root, prefix, f.hashesName(), hashesFile, f.ID, f.Hashes.Bytes); err != nil {
			return err
		}
		pages, err := from.file(root, prefix, f.pagesName(), pagesFile, f.ID, f.Pages.Bytes)
		if err != nil {
			return err
		}
		if f.pageFile = pages; p.linked && !f.rewrite {
			pages.file.Close() // it was the header that mattered
		}
	}
	c := p.index.cursor()
	defer c.reader.close()
	all := c.all()
	for ok := true; ok; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, ok, err = all(); err != nil {
			return err
		}
	}
	return nil
}

func (p *parent) close() {
	for _, f := range p.files {
		if f.hashFile != nil {
			f.hashFile.file.Close()
		}
		if f.pageFile != nil {
			f.pageFile.file.Close()
		}
		if f.copy != nil {
			f.copy.close()
		}
	}
	if p.index != nil {
		p.index.file.file.Close()
	}
	if p.inUse != nil {
		p.inUse.Close()
	}
	if p.dir != nil {
		p.dir.Close()
	}
}

// parentReader answers for one worker whether a page is what the parent has.
type parentReader struct {
	parent *parent
	cursor *cursor
	hashes hashLookup
}

func (p *parent) reader() *parentReader {
	return &parentReader{parent: p, cursor: p.index.cursor(), hashes: hashLookup{reader: new(recordReader)}}
}

// has reports whether the page is in the parent what it is now: the uniform word, if it is uniform, else a page of that
// hash. Where the parent has no content for it, it never is, zeros or not: a page that has content is no hole.
//
// stay is false where the parent's page is in a file that is being rewritten: then the entry must not be the parent's, equal or
// not, and rewrite leaves the page out.
func (r *parentReader) has(block uint32, page uint64, uniform bool, word uint64, hash pageHash) (equal, stay bool, err error) {
	e, err := r.cursor.find(block, page)
	if err != nil {
		return false, false, r.parent.damaged(err)
	}
	if e.kind != Stored {
		return uniform && e.kind == Uniform && e.word == word, true, nil
	}
	f := r.parent.files[e.frame.file]
	if f.rewrite {
		r.parent.submitted.add(place{block, page})
	}
	if uniform {
		return false, !f.rewrite, nil
	}
	ordinal := e.frame.ordinal + uint64(e.slot) + page - e.first
	theirs, err := r.hashes.at(f.hashFile, ordinal, f.PagesInFile)
	if err != nil {
		return false, false, r.parent.damaged(err)
	}
	return theirs == hash, !f.rewrite, nil
}

// frameCopy is a copy of a data file with only the frames in use, each at the place it had, and holes between them: so
// their tags stay valid, and the index says the same of them.
type frameCopy struct {
	from         *parentFile
	reader       *recordReader
	pages        diskFile
	hashes       diskFile
	last         int64           // offset of the frame copied last
	hashesCopied map[uint64]bool // by number of the block
}

// copyFrame makes sure that a frame of the parent is in the writer's copy of the file.
func (p *parent) copyFrame(f *parentFile, at frame) error {
	w := p.writer
	r := w.repository
	if f.copy == nil {
		c := &frameCopy{from: f, reader: new(recordReader), hashesCopied: map[uint64]bool{}}
		f.copy = c
		for _, one := range []struct {
			to   *diskFile
			from *sealedFile
		}{{&c.pages, f.pageFile}, {&c.hashes, f.hashFile}} {
			file, err := r.disk.create(w.stage(one.from.name))
			if err != nil {
				return fmt.Errorf("create a copy of %s: %w", one.from.name, err)
			}
			*one.to = file
			if err := writeAt(file, one.from, one.from.fileHeader(r.id), 0); err != nil {
				return err
			}
			if err := file.Truncate(one.from.size); err != nil {
				return fmt.Errorf("write a copy of %s: %w", one.from.name, err)
			}
		}
	}
	c := f.copy
	if at.offset == c.last {
		return nil // the entries of one frame mostly stand together
	}
	c.last = at.offset
	if err := c.copy(c.pages, f.pageFile, frameRecord, at.offset, at.end()-at.offset); err != nil {
		return err
	}
	for n := at.ordinal / blockHashes; n <= (at.ordinal+uint64(at.pages)-1)/blockHashes; n++ {
		if c.hashesCopied[n] {
			continue
		}
		c.hashesCopied[n] = true
		in := min(blockHashes, f.PagesInFile-n*blockHashes)
		offset := fileHeaderBytes + int64(n)*hashRecordBytes
		if err := c.copy(c.hashes, f.hashFile, hashRecord, offset, recordOverhead+int64(in)*hashBytes); err != nil {
			return err
		}
	}
	return nil
}

func writeAt(to diskFile, from *sealedFile, p []byte, offset int64) error {
	if _, err := to.WriteAt(p, offset); err != nil {
		return fmt.Errorf("write a copy of %s: %w", from.name, err)
	}
	return nil
}

// copy copies one record to the same place. It is checked on the way, and decrypted for that; sealing it again gives the
// very same bytes.
func (c *frameCopy) copy(to diskFile, from *sealedFile, kind recordKind, offset, length int64) error {
	if _, _, err := c.reader.read(from, kind, offset, length); err != nil {
		return err
	}
	record := c.reader.buf[:length]
	from.seal(record, offset)
	return writeAt(to, from, record, offset)
}

func (c *frameCopy) close() {
	for _, f := range []diskFile{c.pages, c.hashes} {
		if f != nil {
			f.Close()
		}
	}
}

// finish syncs and closes the copies, and takes their digests.
func (c *frameCopy) finish(ctx context.Context, w *Writer) (pages, hashes FileInfo, err error) {
	if pages, err = w.finishCopy(ctx, &c.pages, c.from.pageFile); err != nil {
		return pages, hashes, err
	}
	hashes, err = w.finishCopy(ctx, &c.hashes, c.from.hashFile)
	return pages, hashes, err
}

// finishCopy ends one copy, and sets it to nil once it is closed. Since frames were written to it in the order of the index, its
// digest is taken of what lies on the volume: of the very file that was written, then, and only if it has kept its size.
func (w *Writer) finishCopy(ctx context.Context, copied *diskFile, from *sealedFile) (FileInfo, error) {
	failed := func(what string, err error) (FileInfo, error) {
		return FileInfo{}, fmt.Errorf("%s a copy of %s: %w", what, from.name, err)
	}
	if err := (*copied).Sync(); err != nil {
		return failed("sync", err)
	}
	written, err := (*copied).Stat()
	if err != nil {
		return failed("look at", err)
	}
	f, info, err := openRegular(w.repository.root, w.stage(from.name))
	if err != nil {
		return failed("open", err)
	}
	defer f.Close()
	if !os.SameFile(written, info) {
		return failed("open", errors.New("it was exchanged while it was written"))
	}
	if info.Size() != from.size {
		return failed("open", fmt.Errorf("it has %d bytes, not %d", info.Size(), from.size))
	}
	digest := w.repository.keys.newFileDigest()
	buf := make([]byte, writeBytes)
	for left := from.size; left > 0; {
		if err := ctx.Err(); err != nil {
			return FileInfo{}, err
		}
		n := min(left, int64(len(buf)))
		if _, err := io.ReadFull(f, buf[:n]); err != nil {
			return failed("read", err)
		}
		digest.Write(buf[:n])
		left -= n
	}
	closing := (*copied).Close()
	*copied = nil
	if closing != nil {
		return failed("close", closing)
	}
	done := FileInfo{Bytes: from.size}
	digest.Sum(done.Digest[:0])
	return done, nil
}
