package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// testKeys returns fixed keys.
func testKeys(encrypted bool) Keys {
	keys := Keys{Secret: [32]byte{1, 2, 3}}
	if encrypted {
		keys.Encryption = &[32]byte{4, 5, 6}
	}
	return keys
}

func newRepository(t testing.TB, keys Keys) *Repository {
	t.Helper()
	dir := t.TempDir()
	if err := InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	r, err := OpenRepository(dir, keys)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// memory is the machine that cannot be wrong: every byte of every block, and which pages are absent.
type memory struct {
	blocks []BlockInfo
	bytes  [][]byte
	kinds  [][]Kind // Uniform and Stored are not told apart: Stored
}

func newMemory(blocks []BlockInfo) *memory {
	m := &memory{blocks: blocks}
	for _, b := range blocks {
		m.bytes = append(m.bytes, make([]byte, b.Bytes))
		m.kinds = append(m.kinds, make([]Kind, b.pages()))
	}
	return m
}

func (m *memory) clone() *memory {
	c := &memory{blocks: m.blocks}
	for i := range m.bytes {
		c.bytes = append(c.bytes, bytes.Clone(m.bytes[i]))
		c.kinds = append(c.kinds, slices.Clone(m.kinds[i]))
	}
	return c
}

func (m *memory) page(block int, page uint64) []byte {
	return m.bytes[block][page*pageset.PageBytes:][:pageset.PageBytes]
}

// checkLoad loads the image and compares it with the memory, byte for byte.
func checkLoad(t *testing.T, i *Image, want *memory) {
	t.Helper()
	got := newMemory(want.blocks)
	seen := make([][]int, len(want.blocks))
	for b := range seen {
		seen[b] = make([]int, want.blocks[b].pages())
	}
	var mu sync.Mutex
	err := i.Load(context.Background(), LoadOptions{Parallel: 3}, func(s Span) error {
		mu.Lock()
		defer mu.Unlock()
		for n := range s.Run.Count {
			page := s.Run.First + n
			seen[s.Block][page]++
			got.kinds[s.Block][page] = s.Kind
			switch s.Kind {
			case Uniform:
				fillWord(got.page(s.Block, page), s.Word)
				got.kinds[s.Block][page] = Stored
			case Stored:
				copy(got.page(s.Block, page), s.Data[n*pageset.PageBytes:][:pageset.PageBytes])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("load %s: %v", i.Name(), err)
	}
	for b := range want.blocks {
		for p := range want.blocks[b].pages() {
			switch {
			case seen[b][p] != 1:
				t.Fatalf("load %s: page %#x of block %d came %d times", i.Name(), p, b, seen[b][p])
			case got.kinds[b][p] != want.kinds[b][p]:
				t.Fatalf("load %s: page %#x of block %d is %v, want %v", i.Name(), p, b, got.kinds[b][p], want.kinds[b][p])
			case !bytes.Equal(got.page(b, p), want.page(b, p)):
				t.Fatalf("load %s: page %#x of block %d differs", i.Name(), p, b)
			}
		}
	}
}

// scribbler changes memory at random and tells a writer about it.
type scribbler struct {
	*rand.Rand
	m *memory
}

// content fills a page: with a word over and over, compressible bytes, noise, or what it was.
func (s *scribbler) content(page []byte) {
	switch s.IntN(8) {
	case 0:
		clear(page)
	case 1:
		fillWord(page, uint64(s.IntN(3))<<40)
	case 2: // what it was
	case 3:
		fillWord(page, 7)
		page[s.IntN(len(page))]++ // all but uniform
	case 4, 5:
		for i := 0; i < len(page); i += 8 {
			binary.LittleEndian.PutUint64(page[i:], s.Uint64N(16))
		}
	default:
		for i := 0; i < len(page); i += 8 {
			binary.LittleEndian.PutUint64(page[i:], s.Uint64())
		}
	}
}

// submit changes some pages of a block, within the run, and submits them.
func (s *scribbler) submit(t *testing.T, w *Writer, block int, r pageset.Run, density float64) {
	t.Helper()
	var b *Batch
	for page := r.First; page < r.End(); page++ {
		if s.Float64() >= density {
			continue
		}
		if b == nil {
			var err error
			if b, err = w.Batch(context.Background()); err != nil {
				t.Fatal(err)
			}
			b.Block = block
		}
		s.content(s.m.page(block, page))
		s.m.kinds[block][page] = Stored
		b.Pages = append(b.Pages, page)
		b.Data = append(b.Data, s.m.page(block, page)...)
		if len(b.Pages) == BatchPages || s.IntN(100) == 0 {
			w.Submit(b)
			b = nil
		}
	}
	if b != nil {
		w.Submit(b)
	}
}

func (s *scribbler) absent(w *Writer, block int, r pageset.Run) {
	why := Absence(s.IntN(2))
	w.Absent(block, r, why)
	for page := r.First; page < r.End(); page++ {
		clear(s.m.page(block, page))
		s.m.kinds[block][page] = Kind(why)
	}
}

func (s *scribbler) run(block int) pageset.Run {
	pages := s.m.blocks[block].pages()
	first := s.Uint64N(pages)
	return pageset.Run{First: first, Count: 1 + s.Uint64N(pages-first)}
}

// TestModel makes images at random, increments on any of them, deletes them in any order, and compares each with a copy
// of the memory that it was made of.
func TestModel(t *testing.T) {
	type variant struct {
		compression Compression
		encrypted   bool
		links       bool
	}
	var variants []variant
	for _, c := range []Compression{None, S2, Zstd} {
		variants = append(variants, variant{c, false, true}, variant{c, true, true})
	}
	variants = append(variants, variant{None, false, false}, variant{Zstd, true, false})
	for _, v := range variants {
		t.Run(fmt.Sprintf("%v,encrypted=%v,links=%v", v.compression, v.encrypted, v.links), func(t *testing.T) {
			seeds := uint64(2)
			if testing.Short() {
				seeds = 1
			}
			for seed := range seeds {
				testModel(t, seed, v.compression, v.encrypted, v.links)
			}
		})
	}
}

func testModel(t *testing.T, seed uint64, compression Compression, encrypted, links bool) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 7))
	r := newRepository(t, testKeys(encrypted))
	if !links {
		r.disk = &faultyDisk{disk: r.disk, noLinks: true}
	}
	blocks := []BlockInfo{{"ram", 900 * pageset.PageBytes}, {"empty", 0}, {"vga", 70 * pageset.PageBytes}, {"rom", pageset.PageBytes}}
	truth := map[string]*memory{}
	for step := range 14 {
		var parentName string
		names := make([]string, 0, len(truth))
		for name := range truth {
			names = append(names, name)
		}
		slices.Sort(names)
		if len(names) > 0 && rng.IntN(8) > 0 {
			parentName = names[rng.IntN(len(names))]
		}
		s := &scribbler{Rand: rng}
		spec := Spec{Name: fmt.Sprintf("image-%d", step), Blocks: blocks, Compression: compression, BufferBytes: 1, Workers: 1 + rng.IntN(3)}
		if parentName == "" {
			s.m = newMemory(blocks)
		} else {
			s.m = truth[parentName].clone()
			var err error
			if spec.Parent, err = r.Open(ctx, parentName); err != nil {
				t.Fatal(err)
			}
		}
		if rng.IntN(3) == 0 {
			spec.RewriteBytes = rng.Int64N(4 << 20)
		}
		w, err := r.Create(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		if spec.Parent != nil {
			spec.Parent.Close()
		}
		if rng.IntN(2) == 0 {
			w.table.limit = 1 + rng.IntN(300) // make it spill
		}
		deleteParent := parentName != "" && rng.IntN(4) == 0
		if deleteParent {
			err := r.Delete(ctx, parentName)
			switch {
			case links && err != nil:
				t.Fatal(err)
			case !links && !errors.Is(err, ErrBusy) && len(w.parent.files) > 0:
				t.Fatalf("deleting an image that is being copied from: %v", err)
			}
			if err == nil {
				delete(truth, parentName)
			}
		}
		if parentName == "" {
			for b := range blocks {
				s.submit(t, w, b, pageset.Run{Count: blocks[b].pages()}, 1)
			}
		}
		for range rng.IntN(8) {
			b := []int{0, 0, 0, 2, 3}[rng.IntN(5)]
			run := s.run(b)
			switch rng.IntN(4) {
			case 0:
				s.absent(w, b, run)
			case 1:
				if err := w.Flush(ctx); err != nil {
					t.Fatal(err)
				}
			default:
				s.submit(t, w, b, run, []float64{0.01, 0.2, 1}[rng.IntN(3)])
			}
		}
		if rng.IntN(6) == 0 {
			if err := w.Abort(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		state := []byte(fmt.Sprintf("device state %d", step))
		i, err := w.Seal(ctx, Contents{DeviceState: state})
		if err != nil {
			t.Fatal(err)
		}
		truth[spec.Name] = s.m
		checkLoad(t, i, s.m)
		if got, err := i.DeviceState(ctx); err != nil || !bytes.Equal(got, state) {
			t.Fatalf("device state %q, %v", got, err)
		}
		i.Close()
		if len(truth) > 3 && rng.IntN(3) == 0 {
			name := names[rng.IntN(len(names))]
			if truth[name] != nil {
				if err := r.Delete(ctx, name); err != nil {
					t.Fatal(err)
				}
				delete(truth, name)
			}
		}
	}
	summaries, err := r.Images(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(summaries) != len(truth) {
		t.Fatalf("%d images listed, want %d", len(summaries), len(truth))
	}
	for _, s := range summaries {
		i, err := r.Open(ctx, s.Name)
		if err != nil {
			t.Fatal(err)
		}
		checkLoad(t, i, truth[s.Name])
		if err := i.Verify(ctx, nil); err != nil {
			t.Fatal(err)
		}
		checkPages(t, i, truth[s.Name])
		i.Close()
	}
	left, err := names(r.root, temporaryDir)
	if err != nil || len(left) > 0 {
		t.Fatalf("left over: %v, %v", left, err)
	}
}

// checkPages reads single pages, and compares the manifest's counts with the extents.
func checkPages(t *testing.T, i *Image, want *memory) {
	t.Helper()
	m := i.Manifest()
	got := PageCounts{
		Inherited: m.Pages.Inherited, Unchanged: m.Pages.Unchanged, Written: m.Pages.Written, Rewritten: m.Pages.Rewritten,
		WrittenRaw: m.Pages.WrittenRaw, WrittenBytes: m.Pages.WrittenBytes,
	}
	page := make([]byte, pageset.PageBytes)
	for b := range m.Blocks {
		next := uint64(0)
		for e, err := range i.Extents(b) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Run.First != next {
				t.Fatalf("extent %+v, want one that begins at page %#x", e, next)
			}
			next = e.Run.End()
			got.add(&extent{kind: e.Kind, count: e.Run.Count, seq: ownSeq})
			at := e.Run.First + e.Run.Count/2
			if err := i.ReadPage(b, at, page); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(page, want.page(b, at)) {
				t.Fatalf("page %#x of block %d differs", at, b)
			}
		}
		if next != m.Blocks[b].pages() {
			t.Fatalf("extents of block %d end at page %#x of %#x", b, next, m.Blocks[b].pages())
		}
	}
	if diff := cmp.Diff(m.Pages, got); diff != "" {
		t.Fatalf("page counts (-manifest +extents):\n%s", diff)
	}
}
