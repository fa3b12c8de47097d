package image

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// Verify reads everything that the image consists of and compares it with what was written: the manifest with its MAC, the
// index with the manifest, every frame that is referred to with its tag, its pages with their hashes, and every file with
// its digest. The first damage found is returned, as a [*DamageError] that names the file and the byte.
//
// progress may be nil. It is called now and then with how many bytes have been read of how many, by one goroutine at a time.
func (i *Image) Verify(ctx context.Context, progress func(done, total int64)) error {
	v := &verifier{Image: i, progress: progress}
	for _, f := range i.allFiles() {
		v.total += f.Bytes
	}
	for _, f := range i.manifest.Data {
		v.total += int64(f.PagesUsed) * pageset.PageBytes
	}
	if err := v.checkManifest(); err != nil {
		return err
	}
	// The structure first, since it can say where the damage is. The digests then find what the structure has no use for.
	if err := v.checkFrames(ctx); err != nil {
		return err
	}
	if _, err := i.DeviceState(ctx); err != nil {
		return err
	}
	return v.checkDigests(ctx)
}

// VerifyFiles compares every file with its digest: any byte that is not what was written is found, and named, as by Verify. It
// decompresses nothing, which makes it several times as fast; and so it does not find what a writer did wrong.
func (i *Image) VerifyFiles(ctx context.Context, progress func(done, total int64)) error {
	v := &verifier{Image: i, progress: progress}
	for _, f := range i.allFiles() {
		v.total += f.Bytes
	}
	if err := v.checkManifest(); err != nil {
		return err
	}
	return v.checkDigests(ctx)
}

type verifier struct {
	*Image
	total int64

	mu       sync.Mutex
	done     int64
	progress func(done, total int64)
}

func (v *verifier) advance(bytes int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done += bytes
	if v.progress != nil {
		v.progress(v.done, v.total)
	}
}

func (v *verifier) damage(file string, offset int64, what string, args ...any) error {
	return &DamageError{Image: v.Name(), File: file, Offset: offset, What: fmt.Sprintf(what, args...)}
}

// checkManifest reads the manifest again: it may have changed since the image was opened.
func (v *verifier) checkManifest() error {
	_, digest, err := v.repository.readManifest(v.dir, v.Name())
	if err != nil {
		return err
	}
	if digest != v.digest {
		return v.damage(manifestName, -1, "is another than when the image was opened")
	}
	return nil
}

// checkFrames reads the index and all that it refers to, and holds the manifest's counts against it.
func (v *verifier) checkFrames(ctx context.Context) error {
	m := &v.manifest
	counts := PageCounts{
		Inherited: m.Pages.Inherited, Unchanged: m.Pages.Unchanged, Written: m.Pages.Written, Rewritten: m.Pages.Rewritten,
		WrittenRaw: m.Pages.WrittenRaw, WrittenBytes: m.Pages.WrittenBytes,
	}
	used := make([]uint64, len(m.Data))
	var extents uint64
	group, ctx := errgroup.WithContext(ctx)
	pieces := make(chan []extent)
	group.Go(func() error {
		defer close(pieces)
		counting := make(chan []extent)
		group.Go(func() error {
			defer close(counting)
			return v.pieces(ctx, LoadOptions{}, counting)
		})
		for piece := range counting {
			for _, e := range piece {
				extents++
				e.seq = ownSeq // who had it first is history
				counts.add(&e)
				if e.kind == Stored {
					used[e.frame.file] += e.count
				}
			}
			select {
			case pieces <- piece:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			w := newFrameVerifier(v)
			defer w.close()
			for piece := range pieces {
				if err := w.verify(ctx, piece); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if counts != m.Pages || extents != m.Index.Extents {
		return v.damage(indexName, -1, "has %d extents with %+v, the manifest says %d with %+v", extents, counts, m.Index.Extents, m.Pages)
	}
	for n, f := range m.Data {
		if used[n] != f.PagesUsed {
			return v.damage(indexName, -1, "refers to %d pages of %s, the manifest says %d", used[n], f.pagesName(), f.PagesUsed)
		}
	}
	return nil
}

// frameVerifier is one worker of checkFrames.
type frameVerifier struct {
	*verifier
	frames *frameReader
	hashes hashLookup
	raw    []byte
	last   frame // in raw
}

func newFrameVerifier(v *verifier) *frameVerifier {
	return &frameVerifier{
		verifier: v,
		frames:   newFrameReader(v.Image),
		hashes:   hashLookup{reader: new(recordReader)},
		raw:      make([]byte, frameRawBytes),
	}
}

func (w *frameVerifier) close() { w.frames.close() }

func (w *frameVerifier) verify(ctx context.Context, piece []extent) error {
	var read int64
	for i := range piece {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &piece[i]
		if e.kind != Stored {
			continue
		}
		if w.last != e.frame {
			w.last = frame{}
			if err := w.frames.read(e.frame, w.raw[:int(e.frame.pages)*pageset.PageBytes]); err != nil {
				return err
			}
			w.last = e.frame
		}
		hashes, err := w.hashFile(e.frame.file)
		if err != nil {
			return err
		}
		for slot := uint64(e.slot); slot < uint64(e.slot)+e.count; slot++ {
			ordinal := e.frame.ordinal + slot
			want, err := w.hashes.at(hashes, ordinal, w.manifest.Data[e.frame.file].PagesInFile)
			if err != nil {
				return err
			}
			if got := w.keys.hashPage(w.raw[slot*pageset.PageBytes:][:pageset.PageBytes]); got != want {
				at := fileHeaderBytes + int64(ordinal/blockHashes)*hashRecordBytes + recordHeaderBytes + int64(ordinal%blockHashes)*hashBytes
				return hashes.damage(at, "not the hash of its page")
			}
		}
		read += int64(e.count) * pageset.PageBytes
	}
	w.advance(read)
	return nil
}

// checkDigests reads every file from end to end.
func (v *verifier) checkDigests(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, f := range v.allFiles() {
		group.Go(func() error { return v.checkDigest(ctx, f) })
	}
	return group.Wait()
}

func (v *verifier) checkDigest(ctx context.Context, f namedFile) error {
	file, info, err := openRegular(v.dir, f.name)
	if err != nil {
		return readError(v.Name(), f.name, 0, err)
	}
	defer file.Close()
	if info.Size() != f.Bytes {
		return v.damage(f.name, min(info.Size(), f.Bytes), "the file has %d bytes, not %d", info.Size(), f.Bytes)
	}
	digest := v.keys.newFileDigest()
	buf := make([]byte, writeBytes)
	for left := f.Bytes; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(left, int64(len(buf)))
		if got, err := io.ReadFull(file, buf[:n]); err != nil {
			return readError(v.Name(), f.name, f.Bytes-left+int64(got), err)
		}
		digest.Write(buf[:n])
		left -= n
		v.advance(n)
	}
	if Digest(digest.Sum(nil)) == f.Digest {
		return nil
	}
	return v.locate(f)
}

// locate finds where a file is damaged whose digest is wrong: the first byte that belongs to no valid record.
func (v *verifier) locate(f namedFile) error {
	from := v.files
	file, err := from.file(v.dir, "", f.name, f.kind, f.id, f.Bytes)
	if err != nil {
		return err
	}
	defer file.file.Close()
	reader := new(recordReader)
	head := make([]byte, recordHeaderBytes)
	for offset := int64(fileHeaderBytes); offset < f.Bytes; {
		if f.Bytes-offset < recordOverhead {
			return file.damage(offset, "the digest of the file does not match, and no record is here")
		}
		if err := file.readFull(head, offset); err != nil {
			return err
		}
		h := decodeRecordHeader(head)
		if h == (recordHeader{}) {
			// A copy with holes: what is in one belongs to no page, and where it ends only the index knows.
			return file.damage(-1, "the digest of the file does not match; no page of the image is damaged")
		}
		if _, _, err := reader.read(file, h.kind, offset, h.total()); err != nil {
			return err
		}
		offset += h.total()
	}
	return file.damage(-1, "the digest of the file does not match")
}
