package image

import (
	"fmt"
	"os"
	"sync"
)

// ownFile stands for the writer's own data file in the entries of its table. Entries of the parent have the parent's numbers.
const ownFile = ^uint32(0)

// table holds the entries of the image being written: those that came last in memory, the others in sorted runs on disk.
type table struct {
	writer *Writer
	limit  int

	mu      sync.Mutex
	entries []extent
	runs    []run
}

// run is a sorted run on disk.
type run struct {
	path    string
	sealer  *sealer
	entries uint64
	file    *os.File // once it is read
}

// add takes entries in, all of one call's place in the order.
func (t *table) add(seq uint64, entries []extent) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range entries {
		e.seq = seq
		t.entries = append(t.entries, e)
	}
	if len(t.entries) >= t.limit {
		t.writer.fail(t.spill())
	}
}

// spill writes a run. Whoever adds an entry meanwhile waits: so there is never more than one table in memory.
func (t *table) spill() error {
	w := t.writer
	n, err := newID(w.spec.Random)
	if err != nil {
		return err
	}
	r := run{path: fmt.Sprintf("%s/run-%d", w.dir, len(t.runs))}
	if r.sealer, err = newSealer(&w.repository.keys, runFile, n, w.encrypted); err != nil {
		return err
	}
	f, err := w.repository.disk.create(r.path)
	if err != nil {
		return fmt.Errorf("create a sorted run: %w", err)
	}
	defer f.Close()
	if r.entries, err = writeRun(f, r.sealer, coalesced(resolved(sorted(t.entries)))); err != nil {
		return fmt.Errorf("write a sorted run: %w", err)
	}
	t.runs = append(t.runs, r)
	t.entries = t.entries[:0]
	return nil
}

// all yields every entry, resolved. Nothing is added from then on.
func (t *table) all() (source, error) {
	sources := []source{sorted(t.entries)}
	for i := range t.runs {
		r := &t.runs[i]
		var err error
		if r.file, _, err = openRegular(t.writer.repository.root, r.path); err != nil {
			return nil, fmt.Errorf("open a sorted run: %w", err)
		}
		sources = append(sources, readRun(r.file, r.sealer, r.entries))
	}
	return resolved(merged(sources...)), nil
}

func (t *table) close() {
	for _, r := range t.runs {
		if r.file != nil {
			r.file.Close()
		}
	}
}
