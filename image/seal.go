package image

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
)

// Seal ends the image: it writes the index and everything else, syncs it all, and makes the image visible by one rename.
// If it fails nothing is visible, unless the error is a [*VisibleError], and the caller aborts. The errors to act on are
// [*MissingPagesError], [*SpaceError], [*ParentError], [ErrExists] and [*VisibleError].
func (w *Writer) Seal(ctx context.Context, contents Contents) (*Image, error) {
	if w.sealed || w.removed {
		return nil, fmt.Errorf("seal image %s: %w", w.spec.Name, ErrClosed)
	}
	w.fail(w.rewrite(ctx))
	w.stop()
	if err := w.err(); err != nil {
		return nil, err
	}
	i, err := w.seal(ctx, contents)
	if err != nil {
		err = fmt.Errorf("seal image %s: %w", w.spec.Name, w.repository.spaceError(err))
		w.fail(err)
		return nil, err
	}
	w.sealed = true
	// The image is there. What is left of the temporary directory is nothing that could be missed, and Sweep's if need be.
	w.discard()
	// Opened again it has the paths of its name in its errors. It need not be there any more, nor need there be room for one
	// more open file.
	named, err := w.repository.Open(ctx, w.spec.Name)
	if err == nil && named.digest == i.digest {
		i, named = named, i
	}
	if err == nil {
		named.Close()
	}
	return i, nil
}

func (w *Writer) seal(ctx context.Context, contents Contents) (*Image, error) {
	r := w.repository
	m := &Manifest{
		Format: formatName, Version: formatVersion,
		Repository: r.id, ID: w.id, Name: w.spec.Name, Created: w.spec.Clock().UTC(),
		Blocks:  w.spec.Blocks,
		Machine: contents.Machine, Attributes: contents.Attributes, Report: contents.Report,
		Compression: w.spec.Compression, Encryption: encryptionNone,
		Data: []DataFile{},
	}
	if w.parent != nil {
		m.Parent = &w.parent.info
	}
	if w.encrypted {
		m.Encryption = encryptionAES
		m.KeyCheck = hex.EncodeToString(r.keys.encryptionCheck(r.id))
	}
	own := DataFile{ID: w.id, PagesInFile: w.room.ordinal}
	var err error
	if own.Pages, err = w.data.finish(); err != nil {
		return nil, err
	}
	if own.Hashes, err = w.hashes.finish(); err != nil {
		return nil, err
	}
	if err := w.writeIndex(ctx, m, own); err != nil {
		return nil, err
	}
	if err := w.settle(ctx, m, own); err != nil {
		return nil, err
	}
	if err := w.writeState(m, contents.DeviceState); err != nil {
		return nil, err
	}
	manifest, mac, err := encodeManifest(&r.keys, m)
	if err != nil {
		return nil, err
	}
	if err := writeFile(r.disk, w.stage(macName), mac); err != nil {
		return nil, err
	}
	if err := writeFile(r.disk, w.stage(manifestName), manifest); err != nil {
		return nil, err
	}
	if err := r.disk.syncDir(w.stage("")); err != nil {
		return nil, fmt.Errorf("sync the image's directory: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	i, err := w.openStaged(manifestDigest(manifest))
	if err != nil {
		return nil, err
	}
	if err := w.publish(); err != nil {
		i.Close()
		return nil, err
	}
	return i, nil
}

// openStaged opens the image before it is visible: what cannot be opened never is.
func (w *Writer) openStaged(manifest Digest) (*Image, error) {
	dir, err := openDir(w.repository.root, w.stage(""))
	if err != nil {
		return nil, fmt.Errorf("open what was written: %w", err)
	}
	i, err := w.repository.open(dir, w.spec.Name)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("open what was written: %w", err)
	}
	if i.digest != manifest {
		i.Close()
		return nil, errors.New("open what was written: another manifest is in its place")
	}
	return i, nil
}

// publish is the one rename.
func (w *Writer) publish() error {
	r := w.repository
	name := imagePath(w.spec.Name)
	// Renaming onto a directory with something in it fails; of two writers of one name one gets this error.
	if err := r.disk.rename(w.stage(""), name); err != nil {
		if _, there := r.root.Lstat(name); there == nil {
			return errors.Join(ErrExists, err)
		}
		return fmt.Errorf("make the image visible: %w", err)
	}
	if err := r.disk.syncDir(imagesDir); err != nil {
		// Visible, but perhaps not after a power cut: so not visible.
		err = fmt.Errorf("sync the repository's directory: %w", err)
		if back := r.root.Rename(name, w.stage("")); back != nil {
			if _, there := r.root.Lstat(name); !errors.Is(there, fs.ErrNotExist) {
				return &VisibleError{Image: w.spec.Name, Err: errors.Join(err, back)}
			}
		}
		return err
	}
	return nil
}

// writeIndex merges the writer's entries with the parent's, writes them, and fills in the manifest's index, data files
// and page counts.
func (w *Writer) writeIndex(ctx context.Context, m *Manifest, own DataFile) error {
	r := w.repository
	s, err := newSealer(&r.keys, indexFile, w.id, w.encrypted)
	if err != nil {
		return err
	}
	// An image without compression has none in its index either, so that its reader needs none.
	how := w.spec.Compression
	if how == S2 {
		how = Zstd // the index is small
	}
	out, err := newRecordWriter(r.disk, &r.keys, w.stage(indexName), s, r.id, how)
	if err != nil {
		return err
	}
	defer out.file.Close() // for when it fails; finish closes it
	defer w.table.close()
	entries, err := w.table.all()
	if err != nil {
		return err
	}
	var inherit source
	if w.parent != nil {
		inherit = w.parent.index.cursor().all()
	}
	renumber := w.renumber(m, own)
	counts := &m.Pages
	*counts = PageCounts{
		Unchanged: w.unchanged.Load(), Written: w.stored.Load(), Rewritten: w.rewritten.Load(),
		WrittenRaw: w.Progress().RawBytes, WrittenBytes: w.storedBytes.Load(),
	}
	merge := overParent(entries, inherit)
	final := coalesced(complete(func() (extent, bool, error) {
		e, ok, err := merge()
		if !ok || err != nil {
			return e, ok, err
		}
		if err := ctx.Err(); err != nil {
			return e, false, err
		}
		counts.add(&e)
		if e.kind == Stored {
			err = renumber(&e)
		}
		e.seq = 0
		return e, true, err
	}, w.spec.Blocks))

	x := newIndexWriter(out)
	for {
		e, ok, err := final()
		if gap := new(gapError); errors.As(err, &gap) {
			return w.missing(gap)
		}
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if err := x.add(&e); err != nil {
			return err
		}
	}
	if m.Index.Directory, err = x.finish(); err != nil {
		return err
	}
	m.Index.Extents = x.total
	m.Index.FileInfo, err = out.finish()
	return err
}

func (c *PageCounts) add(e *extent) {
	c.Total += e.count
	switch e.kind {
	case Unpopulated:
		c.Unpopulated += e.count
	case Evicted:
		c.Evicted += e.count
	case Uniform:
		c.Uniform += e.count
	case Stored:
		c.Stored += e.count
	}
	if e.seq == parentSeq {
		c.Inherited += e.count
	}
}

// renumber returns a function that gives the data file of a Stored entry its number in the image, in the order in which
// they are first referred to, and copies the frame where the file could not be linked.
func (w *Writer) renumber(m *Manifest, own DataFile) func(*extent) error {
	numbers := map[uint32]uint32{}
	return func(e *extent) error {
		old := e.frame.file
		if w.parent != nil && old != ownFile && !w.parent.linked {
			if err := w.parent.copyFrame(w.parent.files[old], e.frame); err != nil {
				return w.parent.damaged(err)
			}
		}
		n, known := numbers[old]
		if !known {
			f := own
			if old != ownFile {
				f = w.parent.files[old].DataFile
				f.PagesUsed = 0
			}
			if len(m.Data) == maxDataFiles {
				return &ParentError{Parent: w.parent.info.Name, Reason: fmt.Sprintf("the image would be made of more than %d data files", maxDataFiles)}
			}
			n = uint32(len(m.Data))
			numbers[old] = n
			m.Data = append(m.Data, f)
		}
		e.frame.file = n
		m.Data[n].PagesUsed += e.count
		return nil
	}
}

func (w *Writer) missing(gap *gapError) error {
	if int(gap.block) >= len(w.spec.Blocks) || gap.count == 0 {
		return gap
	}
	e := &MissingPagesError{Block: w.spec.Blocks[gap.block].Name}
	e.Run.First, e.Run.Count = gap.first, gap.count
	return e
}

// settle removes the data files that nothing refers to and ends the copies of those that could not be linked.
func (w *Writer) settle(ctx context.Context, m *Manifest, own DataFile) error {
	used := map[ID]bool{}
	for i := range m.Data {
		used[m.Data[i].ID] = true
	}
	remove := func(f *DataFile) error {
		for _, name := range []string{f.pagesName(), f.hashesName()} {
			if err := w.repository.disk.remove(w.stage(name)); err != nil {
				return fmt.Errorf("remove unused data file %s: %w", name, err)
			}
		}
		return nil
	}
	if !used[own.ID] {
		if err := remove(&own); err != nil {
			return err
		}
	}
	if w.parent == nil {
		return nil
	}
	for _, f := range w.parent.files {
		switch {
		case w.parent.linked && !used[f.ID]:
			if err := remove(&f.DataFile); err != nil {
				return err
			}
		case f.copy != nil:
			pages, hashes, err := f.copy.finish(ctx, w)
			if err != nil {
				return err
			}
			for i := range m.Data {
				if m.Data[i].ID == f.ID {
					m.Data[i].Pages, m.Data[i].Hashes, m.Data[i].HolesBetween = pages, hashes, true
				}
			}
		}
	}
	return nil
}

func (w *Writer) writeState(m *Manifest, state []byte) error {
	r := w.repository
	s, err := newSealer(&r.keys, stateFile, w.id, w.encrypted)
	if err != nil {
		return err
	}
	out, err := newRecordWriter(r.disk, &r.keys, w.stage(stateName), s, r.id, w.spec.Compression)
	if err != nil {
		return err
	}
	if err := out.append(recordHeader{kind: stateRecord}, state); err != nil {
		out.file.Close()
		return err
	}
	m.DeviceState, err = out.finish()
	return err
}
