package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmckpt/vmckpt/image/pageset"
)

const (
	// BatchPages is how many pages a batch holds at most.
	BatchPages = 256
	// BatchBytes is the capacity of a batch's Data.
	BatchBytes = BatchPages * pageset.PageBytes

	defaultBufferBytes = 64 << 20

	// tableEntries bounds what a writer holds of its index in memory: 18 MiB, at 72 bytes an entry, or 16 GiB of memory in full
	// frames. Beyond it, entries go to a sorted run.
	tableEntries = 256 << 10
)

// Spec says what image to write.
type Spec struct {
	Name        string
	Parent      *Image // nil: a base. It is needed during Create only and may be closed afterwards.
	Blocks      []BlockInfo
	Compression Compression

	// BufferBytes bounds the memory for pages in flight; 0 means 64 MiB.
	BufferBytes int
	// Workers is how many goroutines compress; 0 means as many as there are processors to use, at most 16: each has buffers.
	Workers int

	// EstimateBytes is what the image will probably take of the volume. Create fails with a [*SpaceError] where less is
	// free, once ReserveBytes are left for others. Writing fails so as soon as less than ReserveBytes is left.
	EstimateBytes int64
	ReserveBytes  int64

	// RewriteBytes is how many bytes of pages, at most, may be copied out of ancestors' data files of which little is still
	// used, so that those need not be linked any further.
	RewriteBytes int64

	Clock  func() time.Time // nil: time.Now
	Random io.Reader        // nil: crypto/rand
}

// Batch is a buffer of pages on their way into an image.
type Batch struct {
	Block int      // index into Spec.Blocks
	Pages []uint64 // page numbers within the block, ascending; at most BatchPages
	Data  []byte   // their content, in the same order; its capacity is BatchBytes
}

// Contents is what an image holds beside memory.
type Contents struct {
	DeviceState []byte            // at most 64 MiB
	Machine     json.RawMessage   // see [Manifest]
	Attributes  map[string]string // see [Manifest]
	Report      json.RawMessage   // see [Manifest]
}

// Progress is how far a writer has come.
type Progress struct {
	Seen, Stored, Uniform, Unchanged uint64 // pages
	RawBytes, StoredBytes            int64  // of the stored pages, before and after compression
}

// Writer writes one image. Its methods may be called from several goroutines, but for Seal and Abort, which end it.
//
// Batches go through three hands: a worker sorts the pages out (uniform, the parent's, to be stored), compresses frames and
// reserves their place in the data file; knowing the place, it seals them; the appender puts them into the file in order,
// taking the digest as it goes.
type Writer struct {
	repository *Repository
	spec       Spec
	id         ID
	encrypted  bool
	dir        string   // beneath the repository
	alive      *os.File // its lock says that we live
	parent     *parent  // nil: a base

	batches chan *Batch
	packed  chan *packed // free ones
	work    chan job
	ready   chan *packed // from workers to appender, as they come
	flushes chan chan struct{}
	workers sync.WaitGroup
	ended   chan struct{} // closed by the appender
	table   *table

	data       *recordWriter // the appender's
	hashes     *hashWriter   // the appender's
	dataSealer *sealer

	room struct { // the place of the next frame
		sync.Mutex
		offset  int64
		ordinal uint64
		frames  uint64
	}
	order struct { // of the calls
		sync.Mutex
		seq  uint64
		open map[uint64]struct{} // submitted, not yet in the file
		done chan struct{}       // closed and replaced whenever one leaves open
		over bool                // sealed or aborted
	}
	failure struct {
		sync.Mutex
		err error
		set chan struct{} // closed with the first
	}
	seen, stored, uniform, unchanged, rewritten atomic.Uint64 // pages
	storedBytes                                 atomic.Int64
	sealed, removed                             bool
}

// job is a batch with its place in the order of calls.
type job struct {
	batch   *Batch
	seq     uint64
	rewrite bool // the parent's pages, to be stored all the same
}

// Create begins an image in a temporary directory of its own. The caller ends it by Seal or Abort. The errors to act on are
// [ErrExists], [*SpaceError] and [*ParentError].
func (r *Repository) Create(ctx context.Context, spec Spec) (*Writer, error) {
	w, err := r.create(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("create image %s: %w", spec.Name, err)
	}
	return w, nil
}

func (r *Repository) create(ctx context.Context, spec Spec) (_ *Writer, err error) {
	if spec.BufferBytes <= 0 {
		spec.BufferBytes = defaultBufferBytes
	}
	if spec.Workers <= 0 {
		spec.Workers = min(runtime.GOMAXPROCS(0), 16)
	}
	if spec.Clock == nil {
		spec.Clock = time.Now
	}
	if spec.Random == nil {
		spec.Random = rand.Reader
	}
	spec.Blocks = slices.Clone(spec.Blocks)
	if err := CheckName(spec.Name); err != nil {
		return nil, err
	}
	if err := checkBlocks(spec.Blocks); err != nil {
		return nil, err
	}
	if spec.Compression > S2 {
		return nil, fmt.Errorf("unknown %v", spec.Compression)
	}
	w := &Writer{repository: r, spec: spec, encrypted: r.keys.aead != nil}
	if w.id, err = newID(spec.Random); err != nil {
		return nil, err
	}
	if err := r.space(spec.EstimateBytes, spec.ReserveBytes); err != nil {
		return nil, err
	}
	if spec.Parent != nil {
		if err := w.checkParent(); err != nil {
			return nil, err
		}
	}
	begun := w // what is returned is nil where there is an error
	defer func() {
		if err != nil {
			begun.discard()
			err = r.spaceError(err)
		}
	}()
	if err := w.enter(ctx); err != nil {
		return nil, err
	}
	if w.parent != nil {
		if err := w.parent.open(ctx); err != nil {
			return nil, err
		}
	}
	if err := w.start(); err != nil {
		return nil, err
	}
	return w, nil
}

// space fails where the volume has too little free.
func (r *Repository) space(need, reserve int64) error {
	free, err := r.disk.free()
	if err != nil {
		return err
	}
	if free < need+reserve {
		return &SpaceError{Need: need + reserve, Free: free}
	}
	return nil
}

// spaceError makes the system's word for a full volume a [*SpaceError].
func (r *Repository) spaceError(err error) error { return spaceError(r.disk, err) }

func spaceError(d disk, err error) error {
	if err == nil || !noSpace(err) {
		return err
	}
	if typed := new(SpaceError); errors.As(err, &typed) {
		return err
	}
	free, failed := d.free()
	if failed != nil {
		free = -1
	}
	return &SpaceError{Free: free, Err: err}
}

// enter makes the temporary directory and puts the parent's data files into it, all of them for now, under the repository's
// lock: from here on the parent may be deleted.
func (w *Writer) enter(ctx context.Context) error {
	r := w.repository
	guard, err := r.lock(ctx, false)
	if err != nil {
		return err
	}
	defer guard.Close()
	if _, err := r.root.Lstat(imagePath(w.spec.Name)); err == nil {
		return ErrExists
	}
	if w.dir, w.alive, err = r.temporary(); err != nil {
		return err
	}
	if err := r.root.Mkdir(w.stage(""), 0o700); err != nil {
		return fmt.Errorf("make a temporary directory: %w", err)
	}
	if w.parent == nil {
		return nil
	}
	return w.parent.take(w)
}

// stage returns the path of a file of the image while it is being written.
func (w *Writer) stage(name string) string {
	if name == "" {
		return w.dir + "/" + stageName
	}
	return w.dir + "/" + stageName + "/" + name
}

// start creates the data file and sets the workers and the appender going.
func (w *Writer) start() error {
	r := w.repository
	own := DataFile{ID: w.id}
	var err error
	if w.dataSealer, err = newSealer(&r.keys, pagesFile, w.id, w.encrypted); err != nil {
		return err
	}
	hashSealer, err := newSealer(&r.keys, hashesFile, w.id, w.encrypted)
	if err != nil {
		return err
	}
	if w.data, err = newRecordWriter(r.disk, &r.keys, w.stage(own.pagesName()), w.dataSealer, r.id, None); err != nil {
		return err
	}
	out, err := newRecordWriter(r.disk, &r.keys, w.stage(own.hashesName()), hashSealer, r.id, None)
	if err != nil {
		return err
	}
	w.hashes = &hashWriter{out: out}
	w.room.offset = w.data.offset

	packers := make([]*packer, w.spec.Workers)
	for i := range packers {
		if packers[i], err = newPacker(w); err != nil {
			return err
		}
	}
	// Buffers for output: one a worker fills, one it waits for, one at the appender. What is left of the bound is for input.
	outputs := len(packers) + 2
	inputs := max(len(packers)+1, (w.spec.BufferBytes-outputs*packedBytes-2*writeBytes)/(BatchBytes+8*BatchPages))
	w.batches, w.work = make(chan *Batch, inputs), make(chan job, inputs)
	for range inputs {
		w.batches <- &Batch{} // its memory is taken when first used
	}
	w.packed, w.ready = make(chan *packed, outputs), make(chan *packed, outputs)
	for range outputs {
		w.packed <- &packed{}
	}
	w.flushes, w.ended = make(chan chan struct{}), make(chan struct{})
	w.order.open, w.order.done = map[uint64]struct{}{}, make(chan struct{})
	w.failure.set = make(chan struct{})
	w.table = &table{writer: w, limit: tableEntries}
	for _, p := range packers {
		w.workers.Go(func() {
			defer p.close()
			for j := range w.work {
				p.do(j)
			}
		})
	}
	go w.append()
	return nil
}

// Batch returns an empty batch, waiting for one: so the memory of a writer is bounded. It fails once the writer has.
func (w *Writer) Batch(ctx context.Context) (*Batch, error) {
	if err := w.err(); err != nil {
		return nil, err
	}
	select {
	case b := <-w.batches:
		if b.Data == nil {
			b.Pages, b.Data = make([]uint64, 0, BatchPages), make([]byte, 0, BatchBytes)
		}
		return b, nil
	case <-w.failure.set:
		return nil, w.err()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Release gives a batch back unused.
func (w *Writer) Release(b *Batch) {
	b.Block, b.Pages, b.Data = 0, b.Pages[:0], b.Data[:0]
	w.batches <- b
}

// Submit takes a batch over. Errors show in Flush, Seal and the next Batch.
func (w *Writer) Submit(b *Batch) {
	if err := w.checkBatch(b); err != nil {
		w.fail(err)
		w.Release(b)
		return
	}
	w.order.Lock()
	defer w.order.Unlock()
	if w.order.over {
		w.fail(ErrClosed)
		w.Release(b)
		return
	}
	w.order.seq++
	w.order.open[w.order.seq] = struct{}{}
	w.work <- job{batch: b, seq: w.order.seq} // never waits: there is room for every batch
}

func (w *Writer) checkBatch(b *Batch) error {
	switch {
	case b.Block < 0 || b.Block >= len(w.spec.Blocks):
		return fmt.Errorf("a batch of block %d of %d", b.Block, len(w.spec.Blocks))
	case len(b.Pages) > BatchPages || len(b.Data) != len(b.Pages)*pageset.PageBytes:
		return fmt.Errorf("a batch of %d pages with %d bytes", len(b.Pages), len(b.Data))
	}
	pages := w.spec.Blocks[b.Block].pages()
	for i, p := range b.Pages {
		if p >= pages || i > 0 && p <= b.Pages[i-1] {
			return fmt.Errorf("a batch with page %#x of block %s (%#x pages) out of range or order", p, w.spec.Blocks[b.Block].Name, pages)
		}
	}
	return nil
}

// Absent marks pages that have no content: they come back as zeros. Of this and Submit the later call for a page holds.
func (w *Writer) Absent(block int, run pageset.Run, why Absence) {
	if run.Count == 0 {
		return
	}
	if block < 0 || block >= len(w.spec.Blocks) || why > AbsentEvicted {
		w.fail(fmt.Errorf("pages %v of block %d of %d marked as %v", run, block, len(w.spec.Blocks), Kind(why)))
		return
	}
	if pages := w.spec.Blocks[block].pages(); run.First >= pages || run.Count > pages-run.First {
		w.fail(fmt.Errorf("pages %v of block %s (%#x pages) marked as absent", run, w.spec.Blocks[block].Name, pages))
		return
	}
	w.order.Lock()
	w.order.seq++
	seq := w.order.seq
	w.order.Unlock()
	w.table.add(seq, []extent{{block: uint32(block), first: run.First, count: run.Count, kind: Kind(why)}})
}

// Flush waits until everything submitted before has reached the data file, and returns the writer's first error.
func (w *Writer) Flush(ctx context.Context) error {
	w.order.Lock()
	upTo := w.order.seq
	w.order.Unlock()
	for {
		w.order.Lock()
		waiting, done := false, w.order.done
		for seq := range w.order.open {
			waiting = waiting || seq <= upTo
		}
		w.order.Unlock()
		if !waiting {
			break
		}
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	answer := make(chan struct{})
	select {
	case w.flushes <- answer:
		<-answer
	case <-w.ended:
	}
	return w.err()
}

// Progress may be asked at any time.
func (w *Writer) Progress() Progress {
	stored := w.stored.Load()
	return Progress{
		Seen: w.seen.Load(), Stored: stored, Uniform: w.uniform.Load(), Unchanged: w.unchanged.Load(),
		RawBytes: int64(stored) * pageset.PageBytes, StoredBytes: w.storedBytes.Load(),
	}
}

// err returns the writer's first error.
func (w *Writer) err() error {
	w.failure.Lock()
	defer w.failure.Unlock()
	return w.failure.err
}

func (w *Writer) fail(err error) {
	if err == nil {
		return
	}
	w.failure.Lock()
	defer w.failure.Unlock()
	if w.failure.err == nil {
		w.failure.err = fmt.Errorf("write image %s: %w", w.spec.Name, w.repository.spaceError(err))
		close(w.failure.set)
	}
}

// finished notes that what a submission brought is in the file, or will never be.
func (w *Writer) finished(seq uint64) {
	w.order.Lock()
	defer w.order.Unlock()
	delete(w.order.open, seq)
	close(w.order.done)
	w.order.done = make(chan struct{})
}

// stop lets the workers and the appender end what was submitted, and waits for it.
func (w *Writer) stop() {
	if w.work == nil || w.ended == nil {
		return // never started
	}
	w.order.Lock()
	over := w.order.over
	w.order.over = true
	w.order.Unlock()
	if over {
		return
	}
	close(w.work)
	w.workers.Wait()
	close(w.ready)
	<-w.ended
}

// Abort ends a writer and removes its temporary directory. It may be called at any time and again, after Seal too, where
// it does nothing if Seal succeeded.
func (w *Writer) Abort() error {
	if w.sealed || w.removed {
		return nil
	}
	w.fail(ErrClosed)
	w.stop()
	if err := w.discard(); err != nil {
		return fmt.Errorf("abort image %s: %w", w.spec.Name, err)
	}
	w.removed = true
	return nil
}

// discard closes everything and removes the temporary directory.
func (w *Writer) discard() error {
	if w.data != nil {
		w.data.file.Close()
	}
	if w.hashes != nil {
		w.hashes.out.file.Close()
	}
	if w.parent != nil {
		w.parent.close()
	}
	if w.dir == "" {
		return nil
	}
	return w.repository.removeTemporary(w.dir, w.alive)
}
