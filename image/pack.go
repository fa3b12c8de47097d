package image

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// packed is the frames of one batch, at their place in the data file.
type packed struct {
	seq    uint64
	offset int64
	frames []byte // whole records, one behind the other
	hashes []pageHash
}

// packedBytes is the most that a batch becomes, and what a buffer for it takes.
const packedBytes = BatchBytes + BatchPages*recordOverhead + frameRawBytes/4

// packer is one worker's tools.
type packer struct {
	*Writer
	comp   *compressor
	parent *parentReader // nil: a base

	// Of the batch at hand.
	entries []extent
	pages   []uint64 // to be stored
	hashes  []pageHash
	sizes   []int // of the frames' records
}

func newPacker(w *Writer) (*packer, error) {
	comp, err := newCompressor(w.spec.Compression)
	if err != nil {
		return nil, err
	}
	p := &packer{Writer: w, comp: comp}
	if w.parent != nil {
		p.parent = w.parent.reader()
	}
	return p, nil
}

func (p *packer) close() {
	if p.comp.zstd != nil {
		p.comp.zstd.Close()
	}
}

// do takes a batch to its end: it gives it back, and either hands its frames to the appender or notes that there are none.
func (p *packer) do(j job) {
	if p.err() != nil {
		p.Release(j.batch)
		p.finished(j.seq)
		return
	}
	block := uint32(j.batch.Block)
	if j.rewrite {
		p.rewritten.Add(uint64(len(j.batch.Pages)))
	} else {
		p.seen.Add(uint64(len(j.batch.Pages)))
	}
	data, err := p.sort(j)
	if err != nil || len(p.pages) == 0 {
		p.Release(j.batch)
		p.fail(err)
		p.table.add(j.seq, p.entries)
		p.finished(j.seq)
		return
	}
	out := <-p.packed
	p.compress(out, data)
	p.Release(j.batch)

	out.seq = j.seq
	p.place(out, block)
	p.table.add(j.seq, p.entries)
	p.ready <- out
}

// sort leaves the pages that have to be stored, and their hashes, and entries for all others. It returns the data of those
// to be stored, moved together within the batch.
func (p *packer) sort(j job) ([]byte, error) {
	b := j.batch
	p.entries, p.pages, p.hashes = p.entries[:0], p.pages[:0], p.hashes[:0]
	block := uint32(b.Block)
	keys := &p.repository.keys
	var uniform, unchanged, rewritten uint64
	kept := 0
	for i, page := range b.Pages {
		content := b.Data[i*pageset.PageBytes:][:pageset.PageBytes:pageset.PageBytes]
		word, same := uniformWord(content)
		var hash pageHash
		if !same {
			hash = keys.hashPage(content)
		}
		if p.parent != nil && !j.rewrite {
			equal, stay, err := p.parent.has(block, page, same, word, hash)
			if err != nil {
				return nil, err
			}
			if equal && !stay {
				rewritten++
			} else if equal {
				unchanged++
				p.note(extent{block: block, first: page, count: 1, kind: inherited})
				continue
			}
		}
		if same {
			uniform++
			p.note(extent{block: block, first: page, count: 1, kind: Uniform, word: word})
			continue
		}
		if kept != i {
			copy(b.Data[kept*pageset.PageBytes:], content)
		}
		kept++
		p.pages, p.hashes = append(p.pages, page), append(p.hashes, hash)
	}
	p.uniform.Add(uniform)
	p.unchanged.Add(unchanged)
	p.rewritten.Add(rewritten)
	return b.Data[:kept*pageset.PageBytes], nil
}

// uniformWord reports whether a page is one word of eight bytes, over and over: then it equals itself, shifted by a word.
func uniformWord(page []byte) (uint64, bool) {
	return binary.LittleEndian.Uint64(page), bytes.Equal(page[8:], page[:len(page)-8])
}

// note adds an entry, joining it to the one before where it goes on.
func (p *packer) note(e extent) {
	if n := len(p.entries); n == 0 || !p.entries[n-1].extend(&e) {
		p.entries = append(p.entries, e)
	}
}

// compress makes frames of data, but for the tags and what else depends on their place.
func (p *packer) compress(out *packed, data []byte) {
	if out.frames == nil {
		out.frames = make([]byte, 0, packedBytes)
	}
	out.frames = out.frames[:0]
	p.sizes = p.sizes[:0]
	for raw := range slices.Chunk(data, frameRawBytes) {
		start := len(out.frames)
		h := recordHeader{kind: frameRecord, items: uint8(len(raw) / pageset.PageBytes), raw: uint32(len(raw))}
		out.frames = append(out.frames, make([]byte, recordHeaderBytes)...)
		out.frames, h.compression = p.comp.append(out.frames, raw)
		h.stored = uint32(len(out.frames) - start - recordHeaderBytes)
		h.encode(out.frames[start:])
		out.frames = append(out.frames, make([]byte, tagBytes)...)
		p.sizes = append(p.sizes, len(out.frames)-start)
	}
}

// place reserves room in the data file, completes the frames for it and adds the entries that refer to them.
func (p *packer) place(out *packed, block uint32) {
	out.hashes = append(out.hashes[:0], p.hashes...)
	p.room.Lock()
	out.offset = p.room.offset
	ordinal, number := p.room.ordinal, p.room.frames
	p.room.offset += int64(len(out.frames))
	p.room.ordinal += uint64(len(p.pages))
	p.room.frames += uint64(len(p.sizes))
	p.room.Unlock()

	offset, record, pages := out.offset, out.frames, p.pages
	for _, size := range p.sizes {
		h := decodeRecordHeader(record)
		h.number, h.first = number, ordinal
		h.encode(record)
		p.dataSealer.seal(record[:size], offset)

		f := frame{file: ownFile, pages: h.items, stored: h.stored, offset: offset, ordinal: ordinal}
		for slot, page := range pages[:h.items] {
			p.note(extent{block: block, first: page, count: 1, kind: Stored, slot: uint8(slot), frame: f})
		}
		offset, record, pages = offset+int64(size), record[size:], pages[h.items:]
		ordinal, number = ordinal+uint64(h.items), number+1
	}
	p.stored.Add(uint64(len(p.pages)))
	p.storedBytes.Add(int64(len(out.frames)))
}

// spaceCheckBytes is how much is written between two looks at what is free.
const spaceCheckBytes = 64 << 20

// append is the appender: it writes what the workers packed in the order of the places they were given.
func (w *Writer) append() {
	defer close(w.ended)
	early := map[int64]*packed{} // by offset; never more than there are buffers
	next, checked := w.data.offset, w.data.offset
	for {
		select {
		case answer := <-w.flushes:
			w.fail(w.data.flush())
			close(answer)
		case out, more := <-w.ready:
			if !more {
				return
			}
			early[out.offset] = out
		}
		for out := early[next]; out != nil; out = early[next] {
			delete(early, next)
			next += int64(len(out.frames))
			if w.err() == nil {
				w.fail(w.write(out))
			}
			if w.spec.ReserveBytes > 0 && next-checked >= spaceCheckBytes {
				checked = next
				w.fail(w.repository.space(0, w.spec.ReserveBytes))
			}
			w.finished(out.seq)
			w.packed <- out
		}
	}
}

func (w *Writer) write(out *packed) error {
	if err := w.data.write(out.frames); err != nil {
		return err
	}
	return w.hashes.add(out.hashes)
}
