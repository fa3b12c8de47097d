package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// smallImages makes a base and an increment with some of everything, and what the increment holds.
func smallImages(t *testing.T, r *Repository, how Compression) *memory {
	t.Helper()
	ctx := context.Background()
	blocks := []BlockInfo{{"ram", 40 * pageset.PageBytes}, {"rom", 2 * pageset.PageBytes}}
	m := newMemory(blocks)
	submit := func(w *Writer, block int, pages ...uint64) {
		b, err := w.Batch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		b.Block = block
		for _, p := range pages {
			b.Pages = append(b.Pages, p)
			b.Data = append(b.Data, m.page(block, p)...)
			m.kinds[block][p] = Stored
		}
		w.Submit(b)
	}
	write := func(block int, page uint64, text string) {
		copy(m.page(block, page)[10:], text)
	}
	base, err := r.Create(ctx, Spec{Name: "base", Blocks: blocks, Compression: how, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer base.Abort()
	for p := range uint64(5) {
		write(0, p, fmt.Sprint("page ", p))
	}
	fillWord(m.page(0, 5), 0xdead)
	base.Absent(0, pageset.Run{First: 6, Count: 34}, AbsentUnpopulated)
	submit(base, 0, 0, 1, 2, 3, 4, 5)
	submit(base, 1, 0, 1)
	i, err := base.Seal(ctx, Contents{DeviceState: []byte("first state")})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	inc, err := r.Create(ctx, Spec{Name: "increment", Parent: i, Blocks: blocks, Compression: how, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer inc.Abort()
	write(0, 2, "changed")
	write(0, 30, "new")
	submit(inc, 0, 0, 2, 30)
	inc.Absent(0, pageset.Run{First: 31, Count: 2}, AbsentEvicted)
	m.kinds[0][31], m.kinds[0][32] = Evicted, Evicted
	j, err := inc.Seal(ctx, Contents{DeviceState: []byte("second state"), Machine: []byte(`{"type":"pc"}`), Attributes: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	checkLoad(t, j, m)
	return m
}

// loadInto opens and loads an image; what it delivers until an error goes into a memory, with the pages that came.
func loadInto(r *Repository, name string, blocks []BlockInfo) (got *memory, came [][]bool, state []byte, err error) {
	ctx := context.Background()
	i, err := r.Open(ctx, name)
	if err != nil {
		return nil, nil, nil, err
	}
	defer i.Close()
	got = newMemory(blocks)
	for _, b := range blocks {
		came = append(came, make([]bool, b.pages()))
	}
	err = i.Load(ctx, LoadOptions{Parallel: 1}, func(s Span) error {
		for n := range s.Run.Count {
			p := s.Run.First + n
			came[s.Block][p] = true
			switch s.Kind {
			case Uniform:
				fillWord(got.page(s.Block, p), s.Word)
			case Stored:
				copy(got.page(s.Block, p), s.Data[n*pageset.PageBytes:][:pageset.PageBytes])
			}
		}
		return nil
	})
	if err != nil {
		return got, came, nil, err
	}
	state, err = i.DeviceState(ctx)
	return got, came, state, err
}

// TestEveryByte flips each byte of each file of an image, cuts each file at each length, and lengthens it: Verify finds it
// and says where; nothing else than what was written is ever delivered; and with the byte put back all is well.
func TestEveryByte(t *testing.T) {
	for _, v := range []struct {
		how       Compression
		encrypted bool
	}{{None, false}, {Zstd, true}, {S2, false}} {
		t.Run(fmt.Sprintf("%v,encrypted=%v", v.how, v.encrypted), func(t *testing.T) {
			ctx := context.Background()
			r := newRepository(t, testKeys(v.encrypted))
			want := smallImages(t, r, v.how)
			dir := filepath.Join(r.path, imagesDir, "increment")
			files, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			try := func(file string, offset int, what string) {
				t.Helper()
				i, err := r.Open(ctx, "increment")
				if err == nil {
					err = i.Verify(ctx, nil)
					i.Close()
				}
				damage := new(DamageError)
				switch {
				case !errors.As(err, &damage):
					t.Fatalf("%s at byte %d of %s: Verify says %v", what, offset, file, err)
				case damage.File != file && (file != macName || damage.File != manifestName):
					t.Fatalf("%s at byte %d of %s: Verify names another file: %v", what, offset, file, err)
				case damage.Offset < 0 && file != macName && file != manifestName, damage.Offset > int64(offset):
					t.Fatalf("%s at byte %d of %s: Verify names another place: %v", what, offset, file, err)
				}
				got, came, state, err := loadInto(r, "increment", want.blocks)
				if err == nil && !bytes.Equal(state, []byte("second state")) {
					t.Fatalf("%s at byte %d of %s: device state %q", what, offset, file, state)
				}
				if err != nil && !errors.As(err, &damage) {
					t.Fatalf("%s at byte %d of %s: Load says %v", what, offset, file, err)
				}
				for b := range came {
					for p, c := range came[b] {
						if c && !bytes.Equal(got.page(b, uint64(p)), want.page(b, uint64(p))) {
							t.Fatalf("%s at byte %d of %s: page %#x of block %d delivered wrong", what, offset, file, p, b)
						}
					}
				}
			}
			for _, f := range files {
				path := filepath.Join(dir, f.Name())
				good, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				put := func(content []byte) {
					if err := os.WriteFile(path, content, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				// All files of one variant byte by byte; of the others, what need not be looked at again, in steps.
				step := 1
				if testing.Short() || len(good) > 8192 || v.how != Zstd && (f.Name() == manifestName || f.Name() == macName) {
					step = 29
				}
				for n := 0; n < len(good); n += step {
					bad := bytes.Clone(good)
					bad[n] ^= 1 << (n % 8)
					put(bad)
					try(f.Name(), n, "flipped bit")
				}
				for n := 0; n < len(good); n += 5 * step {
					put(good[:n])
					try(f.Name(), n, "cut off")
				}
				put(append(bytes.Clone(good), 0))
				try(f.Name(), len(good), "lengthened")
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				try(f.Name(), 0, "removed")
				put(good)
			}
			i, err := r.Open(ctx, "increment")
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			if err := i.Verify(ctx, nil); err != nil {
				t.Fatal(err)
			}
			checkLoad(t, i, want)
		})
	}
}

// TestMovedAround puts authentic things where they do not belong.
func TestMovedAround(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name string
		move func(t *testing.T, r *Repository, base, inc string)
	}{
		{"image under another name", func(t *testing.T, r *Repository, base, inc string) {
			rename(t, inc, inc+".old")
			rename(t, base, inc)
		}},
		{"index of the parent", func(t *testing.T, r *Repository, base, inc string) {
			copyFile(t, filepath.Join(base, indexName), filepath.Join(inc, indexName))
		}},
		{"device state of the parent", func(t *testing.T, r *Repository, base, inc string) {
			copyFile(t, filepath.Join(base, stateName), filepath.Join(inc, stateName))
		}},
		{"manifest of the parent, without its MAC", func(t *testing.T, r *Repository, base, inc string) {
			copyFile(t, filepath.Join(base, manifestName), filepath.Join(inc, manifestName))
		}},
		{"frames of one file in another", func(t *testing.T, r *Repository, base, inc string) {
			pages, err := filepath.Glob(filepath.Join(inc, "*.pages"))
			if err != nil || len(pages) != 2 {
				t.Fatal(pages, err)
			}
			a, _ := os.ReadFile(pages[0])
			b, _ := os.ReadFile(pages[1])
			n := min(len(a), len(b))
			copy(a[fileHeaderBytes:n], b[fileHeaderBytes:n])
			if err := os.WriteFile(pages[0], a, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRepository(t, testKeys(false))
			want := smallImages(t, r, None)
			base, inc := filepath.Join(r.path, imagesDir, "base"), filepath.Join(r.path, imagesDir, "increment")
			c.move(t, r, base, inc)
			i, err := r.Open(ctx, "increment")
			if err == nil {
				err = i.Verify(ctx, nil)
				i.Close()
			}
			if damage := new(DamageError); !errors.As(err, &damage) {
				t.Errorf("Verify: %v", err)
			}
			if _, _, _, err := loadInto(r, "increment", want.blocks); err == nil {
				t.Error("loaded")
			}
		})
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDamageWhileLoading changes a frame between Verify and Load: it shows as an error, and the page is not delivered.
func TestDamageWhileLoading(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	smallImages(t, r, None)
	i, err := r.Open(ctx, "increment")
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	if err := i.Verify(ctx, nil); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.path, imagesDir, "increment", i.manifest.Data[0].pagesName())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xff}, fileHeaderBytes+recordHeaderBytes+10); err != nil {
		t.Fatal(err)
	}
	damage := new(DamageError)
	err = i.Load(ctx, LoadOptions{}, func(s Span) error {
		if s.Kind == Stored && s.Block == 0 && s.Run.First == 0 {
			t.Error("a damaged frame was delivered")
		}
		return nil
	})
	if !errors.As(err, &damage) || damage.Offset != fileHeaderBytes {
		t.Errorf("Load: %v", err)
	}
}

// badSector is an open file that cannot be read from a byte on.
type badSector struct {
	readerAtCloser
	from int64
	err  error
}

func (f badSector) ReadAt(p []byte, offset int64) (int, error) {
	if offset+int64(len(p)) > f.from {
		n, _ := f.readerAtCloser.ReadAt(p[:max(0, f.from-offset)], offset)
		return n, &os.PathError{Op: "read", Path: "file", Err: f.err}
	}
	return f.readerAtCloser.ReadAt(p, offset)
}

// TestUnreadable: what the volume cannot give back is damage, with the place; in a parent it means that there has to be a base. An
// error that says nothing of the file is none.
func TestUnreadable(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		err    error
		damage bool
	}{{syscall.EIO, true}, {errFileSystem, true}, {syscall.EBADMSG, true}, {syscall.ENOMEM, false}} {
		r := newRepository(t, testKeys(false))
		m := smallImages(t, r, Zstd)
		i, err := r.Open(ctx, "base")
		if err != nil {
			t.Fatal(err)
		}
		defer i.Close()
		check := func(what string, err error, file string, offset int64, parent bool) {
			t.Helper()
			if !errors.Is(err, c.err) {
				t.Errorf("%s: %v", what, err)
			}
			damage := new(DamageError)
			if is := errors.As(err, &damage); is != c.damage || is && (damage.File != file || damage.Offset != offset) {
				t.Errorf("%s: damage %v, want one in %s at byte %d: %v", what, is, file, offset, err)
			}
			unfit := new(ParentError)
			if is := errors.As(err, &unfit); is != (parent && c.damage) {
				t.Errorf("%s: an unfit parent %v: %v", what, is, err)
			}
		}
		if _, err := i.dataFile(0); err != nil {
			t.Fatal(err)
		}
		pages := i.manifest.Data[0].pagesName()
		i.data[0].file = badSector{i.data[0].file, fileHeaderBytes + 10, c.err}
		check("ReadPage", i.ReadPage(0, 0, make([]byte, pageset.PageBytes)), pages, fileHeaderBytes+10, false)

		for _, which := range []string{"hashes", "index"} {
			w, err := r.Create(ctx, Spec{Name: "child", Parent: i, Blocks: i.manifest.Blocks, Workers: 1})
			if err != nil {
				t.Fatal(err)
			}
			file := &w.parent.files[0].hashFile.file
			name := i.manifest.Data[0].hashesName()
			if which == "index" {
				file, name = &w.parent.index.file.file, indexName
			}
			*file = badSector{*file, fileHeaderBytes, c.err}
			b, err := w.Batch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			b.Pages, b.Data = append(b.Pages, 0), append(b.Data, m.page(0, 0)...)
			w.Submit(b)
			check("Flush, "+which, w.Flush(ctx), name, fileHeaderBytes, true)
			if err := w.Abort(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestIrregularParent: something else in place of a parent's file, or of its directory, means a base as well.
func TestIrregularParent(t *testing.T) {
	ctx := context.Background()
	for _, file := range []string{".", indexName, macName, "hashes", "pages"} {
		r := newRepository(t, testKeys(false))
		i := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
		switch file {
		case "hashes":
			file = i.manifest.Data[0].hashesName()
		case "pages":
			file = i.manifest.Data[0].pagesName()
		}
		path := filepath.Join(r.path, imagePath("parent"), file)
		rename(t, path, filepath.Join(r.path, "away"))
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := r.Create(ctx, Spec{Name: "child", Parent: i, Blocks: someBlocks})
		damage, unfit := new(DamageError), new(ParentError)
		if !errors.As(err, &unfit) || !errors.As(err, &damage) || damage.File != file {
			t.Errorf("%s: as a parent: %v", file, err)
		}
		if _, err = r.Open(ctx, "parent"); !errors.As(err, &damage) || damage.File != file {
			t.Errorf("%s: opened: %v", file, err)
		}
	}
}
