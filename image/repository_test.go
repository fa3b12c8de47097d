package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
)

var someBlocks = []BlockInfo{{"ram", 20 * pageset.PageBytes}}

// sealEmpty makes an image of nothing but evicted pages and one stored one.
func sealEmpty(r *Repository, spec Spec) (*Image, error) {
	ctx := context.Background()
	w, err := r.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	w.Absent(0, pageset.Run{Count: spec.Blocks[0].pages()}, AbsentEvicted)
	b, err := w.Batch(ctx)
	if err != nil {
		return nil, err
	}
	b.Pages, b.Data = append(b.Pages, 3), b.Data[:pageset.PageBytes]
	clear(b.Data)
	copy(b.Data, "page 3")
	w.Submit(b)
	return w.Seal(ctx, Contents{})
}

func mustSeal(t *testing.T, r *Repository, spec Spec) *Image {
	t.Helper()
	i, err := sealEmpty(r, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	return i
}

func TestInitAndOpenRepository(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "repository")
	keys := testKeys(false)
	if _, err := OpenRepository(dir, keys); !errors.Is(err, ErrNotFound) {
		t.Errorf("open what is not there: %v", err)
	}
	if err := InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	if err := InitRepository(dir); !errors.Is(err, ErrExists) {
		t.Errorf("make it again: %v", err)
	}
	if _, err := OpenRepository(dir, Keys{}); err == nil {
		t.Error("opened with no secret")
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, not := range []string{pipe, ""} {
		if _, err := OpenRepository(not, keys); err == nil {
			t.Errorf("opened %q", not)
		}
		if err := InitRepository(not); err == nil {
			t.Errorf("made %q a repository", not)
		}
	}
	path := filepath.Join(dir, repositoryName)
	for _, text := range []string{
		"", "{", "[]", `{"format":"vmckpt repository","version":2,"id":"00000000000000000000000000000001"}`,
		`{"format":"other","version":1,"id":"00000000000000000000000000000001"}`,
		`{"format":"vmckpt repository","version":1,"id":"00000000000000000000000000000000"}`,
		`{"format":"vmckpt repository","version":1,"id":"0001"}`,
		strings.Repeat(" ", 5000),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenRepository(dir, keys); err == nil {
			t.Errorf("opened with %.80q", text)
		}
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "0": true, "vm-1.snapshot": true, strings.Repeat("a", 128): true,
		"": false, ".": false, "..": false, "a/b": false, "-a": false, "a-": false, ".a": false, "A": false, "a b": false,
		"ä": false, "a\n": false, strings.Repeat("a", 129): false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestNameTaken(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	first, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Abort()
	mustSeal(t, r, Spec{Name: "image", Blocks: someBlocks})
	if _, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks}); !errors.Is(err, ErrExists) {
		t.Errorf("create: %v", err)
	}
	first.Absent(0, pageset.Run{Count: 20}, AbsentEvicted)
	if _, err := first.Seal(ctx, Contents{}); !errors.Is(err, ErrExists) {
		t.Errorf("seal the one that came too late: %v", err)
	}
	if err := first.Abort(); err != nil {
		t.Error(err)
	}
	i, err := r.Open(ctx, "image")
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	if i.Manifest().Pages.Stored != 1 {
		t.Error("the first image was replaced")
	}
}

func TestBadSpecs(t *testing.T) {
	r := newRepository(t, testKeys(false))
	for name, blocks := range map[string][]BlockInfo{
		"not whole pages": {{"ram", 100}},
		"no name":         {{"", 4096}},
		"long name":       {{strings.Repeat("x", 256), 4096}},
		"twice":           {{"ram", 4096}, {"ram", 4096}},
		"no UTF-8":        {{"ram\xff", 4096}},
		"too large":       {{"a", 1 << 52}, {"b", 4096}},
		"too many":        make([]BlockInfo, 5000),
	} {
		if _, err := r.Create(context.Background(), Spec{Name: "image", Blocks: blocks}); err == nil {
			t.Errorf("%s: created", name)
		}
	}
	if left, _ := names(r.root, temporaryDir); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestBadCalls(t *testing.T) {
	ctx := context.Background()
	for name, call := range map[string]func(*Writer, *Batch){
		"block":         func(w *Writer, b *Batch) { b.Block = 1; w.Submit(b) },
		"page":          func(w *Writer, b *Batch) { b.Pages, b.Data = append(b.Pages, 20), b.Data[:4096]; w.Submit(b) },
		"order":         func(w *Writer, b *Batch) { b.Pages, b.Data = append(b.Pages, 2, 2), b.Data[:8192]; w.Submit(b) },
		"data":          func(w *Writer, b *Batch) { b.Pages, b.Data = append(b.Pages, 2), b.Data[:8192]; w.Submit(b) },
		"absent block":  func(w *Writer, b *Batch) { w.Absent(-1, pageset.Run{Count: 1}, AbsentEvicted) },
		"absent page":   func(w *Writer, b *Batch) { w.Absent(0, pageset.Run{First: 19, Count: 2}, AbsentEvicted) },
		"absent wraps":  func(w *Writer, b *Batch) { w.Absent(0, pageset.Run{First: 2, Count: ^uint64(0)}, AbsentEvicted) },
		"absent stored": func(w *Writer, b *Batch) { w.Absent(0, pageset.Run{Count: 1}, Absence(Stored)) },
	} {
		r := newRepository(t, testKeys(false))
		w, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		w.Absent(0, pageset.Run{Count: 20}, AbsentEvicted)
		b, err := w.Batch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		call(w, b)
		if w.Flush(ctx) == nil {
			t.Errorf("%s: Flush says nothing", name)
		}
		if _, err := w.Batch(ctx); err == nil {
			t.Errorf("%s: Batch says nothing", name)
		}
		if _, err := w.Seal(ctx, Contents{}); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
}

func TestMissingPages(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	w, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	w.Absent(0, pageset.Run{Count: 5}, AbsentEvicted)
	w.Absent(0, pageset.Run{First: 8, Count: 12}, AbsentEvicted)
	_, err = w.Seal(ctx, Contents{})
	missing := new(MissingPagesError)
	if !errors.As(err, &missing) {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&MissingPagesError{Block: "ram", Run: pageset.Run{First: 5, Count: 3}}, missing); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestEndedWriter(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	w, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks, BufferBytes: 1, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	a, err := w.Batch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	b, err := w.Batch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	brief, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := w.Batch(brief); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a third of two batches: %v", err)
	}
	w.Release(a)
	for range 2 {
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
	}
	w.Submit(b)
	w.Absent(0, pageset.Run{Count: 1}, AbsentEvicted)
	if _, err := w.Batch(ctx); !errors.Is(err, ErrClosed) {
		t.Errorf("Batch: %v", err)
	}
	if err := w.Flush(ctx); !errors.Is(err, ErrClosed) {
		t.Errorf("Flush: %v", err)
	}
	if _, err := w.Seal(ctx, Contents{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Seal: %v", err)
	}
	if left, _ := names(r.root, temporaryDir); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestWrongKeys(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(true))
	mustSeal(t, r, Spec{Name: "encrypted", Blocks: someBlocks})
	for text, keys := range map[string]Keys{
		"the key file has another secret":                         {Secret: [32]byte{9}, Encryption: &[32]byte{4, 5, 6}},
		"the key file has another encryption key":                 {Secret: testKeys(true).Secret, Encryption: &[32]byte{9}},
		"it is encrypted, and the key file has no encryption key": testKeys(false),
	} {
		other, err := OpenRepository(r.path, keys)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		_, err = other.Open(ctx, "encrypted")
		if damage := new(DamageError); !errors.Is(err, ErrWrongKey) || errors.As(err, &damage) ||
			err.Error() != "open image: image encrypted was written under another key: "+text {
			t.Errorf("%s: %v", text, err)
		}
		summaries, err := other.Images(ctx)
		if err != nil || len(summaries) != 1 || errors.Is(summaries[0].Err, ErrWrongKey) != (keys.Secret != testKeys(true).Secret) {
			t.Errorf("%s: %+v, %v", text, summaries, err)
		}
	}
}

// TestAnotherRepository has an image found in a repository of another id, under the right secret.
func TestAnotherRepository(t *testing.T) {
	ctx := context.Background()
	r, other := newRepository(t, testKeys(false)), newRepository(t, testKeys(false))
	mustSeal(t, r, Spec{Name: "image", Blocks: someBlocks})
	check := func(what string, r *Repository, of, here ID) {
		t.Helper()
		_, err := r.Open(ctx, "image")
		damage := new(DamageError)
		if !errors.As(err, &damage) || damage.File != manifestName || errors.Is(err, ErrWrongKey) ||
			!strings.Contains(err.Error(), of.String()) || !strings.Contains(err.Error(), here.String()) {
			t.Errorf("%s: %v", what, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(r.path, repositoryName))
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(text), r.id.String(), other.id.String(), 1)
	if err := os.WriteFile(filepath.Join(r.path, repositoryName), []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := OpenRepository(r.path, testKeys(false))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	check("the id was changed", again, r.id, other.id)
	rename(t, filepath.Join(r.path, imagePath("image")), filepath.Join(other.path, imagePath("image")))
	check("the image was moved", other, r.id, other.id)
}

func TestUnfitParents(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	parent := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
	other := newRepository(t, testKeys(false))
	encrypting, err := OpenRepository(r.path, testKeys(true))
	if err != nil {
		t.Fatal(err)
	}
	defer encrypting.Close()
	check := func(name string, err error) {
		t.Helper()
		if unfit := new(ParentError); !errors.As(err, &unfit) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = other.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: someBlocks})
	check("of another repository", err)
	_, err = encrypting.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: someBlocks})
	check("a plain one of an encrypted image", err)
	_, err = r.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: []BlockInfo{{"ram", 8192}}})
	check("of another size", err)

	path := filepath.Join(r.path, imagesDir, "parent", indexName)
	index, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	index[fileHeaderBytes+40] ^= 1
	if err := os.WriteFile(path, index, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = r.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: someBlocks})
	check("with a damaged index", err)

	if err := r.Delete(ctx, "parent"); err != nil {
		t.Fatal(err)
	}
	_, err = r.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: someBlocks})
	check("deleted", err)
	mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
	_, err = r.Create(ctx, Spec{Name: "image", Parent: parent, Blocks: someBlocks})
	check("another of its name", err)
	if left, _ := names(r.root, temporaryDir); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestRewrite overwrites most of a base in increments: what is left of its file is rewritten within the budget, and the
// file is then no part of the image any more.
func TestRewrite(t *testing.T) {
	ctx := context.Background()
	for _, links := range []bool{true, false} {
		r := newRepository(t, testKeys(true))
		if !links {
			r.disk = &faultyDisk{disk: r.disk, noLinks: true}
		}
		blocks := []BlockInfo{{"ram", 100 * pageset.PageBytes}}
		m := newMemory(blocks)
		write := func(name string, parent *Image, pages pageset.Run, budget int64) *Image {
			w, err := r.Create(ctx, Spec{Name: name, Parent: parent, Blocks: blocks, Compression: Zstd, RewriteBytes: budget})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Abort()
			b, err := w.Batch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for p := pages.First; p < pages.End(); p++ {
				copy(m.page(0, p)[100:], fmt.Sprintf("page %d of %s", p, name))
				m.kinds[0][p] = Stored
				b.Pages, b.Data = append(b.Pages, p), append(b.Data, m.page(0, p)...)
			}
			w.Submit(b)
			i, err := w.Seal(ctx, Contents{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { i.Close() })
			checkLoad(t, i, m)
			return i
		}
		base := write("base", nil, pageset.Run{Count: 100}, 0)
		most := write("most", base, pageset.Run{First: 5, Count: 80}, 1<<20)
		if got := most.Manifest(); len(got.Data) != 2 || got.Pages.Rewritten != 0 {
			t.Errorf("rewritten what is still used for the greater part: %+v", got.Pages)
		}
		small := write("small", most, pageset.Run{First: 5, Count: 1}, 19*pageset.PageBytes)
		if got := small.Manifest(); len(got.Data) != 3 || got.Pages.Rewritten != 0 {
			t.Errorf("rewritten beyond the budget: %+v", got.Pages)
		}
		// Page 2 is submitted, changed: there is nothing of it to be rewritten.
		enough := write("enough", small, pageset.Run{First: 2, Count: 1}, 20*pageset.PageBytes)
		if got := enough.Manifest(); len(got.Data) != 3 || got.Pages.Rewritten != 19 || got.Pages.Written != 20 || got.Pages.Stored != 100 {
			t.Errorf("not rewritten: %d files, %+v", len(got.Data), got.Pages)
		}
		for _, i := range []*Image{base, most, small} {
			if err := r.Delete(ctx, i.Name()); err != nil {
				t.Fatal(err)
			}
		}
		if err := enough.Verify(ctx, nil); err != nil {
			t.Error(err)
		}
		checkLoad(t, enough, m)
	}
}

// TestRewriteUnchanged rewrites what is left of a base while pages are submitted that are what the parent has: none, as where
// tracking knows it, some, or all, as where everything is compared. The file goes, and no page is stored twice.
func TestRewriteUnchanged(t *testing.T) {
	ctx := context.Background()
	const pages, left = 100, 10
	blocks := []BlockInfo{{"ram", pages * pageset.PageBytes}}
	for _, links := range []bool{true, false} {
		for _, submitted := range []uint64{0, left / 2, pages} {
			r := newRepository(t, testKeys(true))
			if !links {
				r.disk = &faultyDisk{disk: r.disk, noLinks: true}
			}
			m := newMemory(blocks)
			write := func(name string, parent *Image, run pageset.Run, change bool, budget int64) *Image {
				w, err := r.Create(ctx, Spec{Name: name, Parent: parent, Blocks: blocks, Compression: Zstd, RewriteBytes: budget})
				if err != nil {
					t.Fatal(err)
				}
				defer w.Abort()
				b, err := w.Batch(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for p := run.First; p < run.End(); p++ {
					if change {
						copy(m.page(0, p)[100:], fmt.Sprintf("page %d of %s", p, name))
						m.kinds[0][p] = Stored
					}
					b.Pages, b.Data = append(b.Pages, p), append(b.Data, m.page(0, p)...)
				}
				w.Submit(b)
				if parent != nil && !change {
					w.Absent(0, pageset.Run{First: pages - 1, Count: 1}, AbsentEvicted)
					clear(m.page(0, pages-1))
					m.kinds[0][pages-1] = Evicted
				}
				i, err := w.Seal(ctx, Contents{})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { i.Close() })
				checkLoad(t, i, m)
				return i
			}
			base := write("base", nil, pageset.Run{Count: pages}, true, 0)
			most := write("most", base, pageset.Run{First: left, Count: pages - left}, true, 0)
			last := write("last", most, pageset.Run{Count: submitted}, false, 1<<20)
			got := last.Manifest()
			if len(got.Data) != 2 || got.Data[0].ID == base.Manifest().ID || got.Data[1].ID == base.Manifest().ID {
				t.Errorf("links=%v, %d submitted: made of %+v", links, submitted, got.Data)
			}
			want := got.Pages
			want.Rewritten, want.Written, want.Unchanged = left, left, max(submitted, left)-left
			if diff := cmp.Diff(want, got.Pages); diff != "" {
				t.Errorf("links=%v, %d submitted (-want +got):\n%s", links, submitted, diff)
			}
			if err := last.Verify(ctx, nil); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestHostileFiles puts other things than files into a repository: none is opened, followed or waited for.
func TestHostileFiles(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("not yours"), 0o600); err != nil {
		t.Fatal(err)
	}
	put := map[string]func(path string) error{
		"link out":  func(path string) error { return os.Symlink(outside, path) },
		"link in":   func(path string) error { return os.Symlink(path+".old", path) },
		"pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	}
	for what, put := range put {
		t.Run(what, func(t *testing.T) {
			ctx := context.Background()
			r := newRepository(t, testKeys(false))
			i := mustSeal(t, r, Spec{Name: "image", Blocks: someBlocks})
			dir := filepath.Join(r.path, imagesDir, "image")
			for _, f := range append(i.allFiles(), namedFile{name: manifestName}, namedFile{name: macName}) {
				path := filepath.Join(dir, f.name)
				rename(t, path, path+".old")
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				if j, err := r.Open(ctx, "image"); err == nil {
					if err := j.Verify(ctx, nil); err == nil {
						t.Errorf("%s: opened and verified", f.name)
					}
					j.Close()
				}
				if _, err := r.Create(ctx, Spec{Name: "child", Parent: i, Blocks: someBlocks}); err == nil &&
					f.name != stateName { // which a child has no use for
					t.Errorf("%s: became a parent", f.name)
				}
				os.Remove(path)
				rename(t, path+".old", path)
			}
			rename(t, dir, dir+".old")
			if err := put(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Open(ctx, "image"); err == nil {
				t.Error("opened in place of the image's directory")
			}
			if _, err := r.Images(ctx); err != nil {
				t.Error(err)
			}
			if err := r.Delete(ctx, "image"); err != nil && what == "directory" {
				t.Error(err)
			}
			for _, name := range []string{imagesDir, temporaryDir, lockName} {
				if what == "directory" && name != lockName {
					continue // which it is
				}
				path := filepath.Join(r.path, name)
				os.RemoveAll(path + ".old")
				rename(t, path, path+".old")
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				for call, err := range map[string]error{
					"Create": func() error {
						w, err := r.Create(ctx, Spec{Name: "other", Blocks: someBlocks})
						if err == nil {
							w.Abort()
						}
						return err
					}(),
					"Delete": r.Delete(ctx, "image"),
					"Sweep":  func() error { _, err := r.Sweep(ctx, -time.Hour); return err }(),
				} {
					if err == nil {
						t.Errorf("%s in place of %s: %s went on", what, name, call)
					}
				}
				if name == imagesDir {
					if _, err := r.Images(ctx); err == nil {
						t.Errorf("%s in place of %s: listed", what, name)
					}
					if i, err := r.Open(ctx, "image.old"); err == nil {
						i.Close()
						t.Errorf("%s in place of %s: opened", what, name)
					}
				}
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				rename(t, path+".old", path)
			}
			if text, err := os.ReadFile(outside); err != nil || string(text) != "not yours" {
				t.Errorf("the file outside: %q, %v", text, err)
			}
		})
	}
}

func TestDeleteAndSweep(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	if err := r.Delete(ctx, "image"); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete what is not there: %v", err)
	}
	if err := r.Delete(ctx, "../image"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("delete by a path: %v", err)
	}
	living, err := r.Create(ctx, Spec{Name: "living", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	defer living.Abort()
	dead, err := r.Create(ctx, Spec{Name: "dead", Blocks: someBlocks})
	if err != nil {
		t.Fatal(err)
	}
	dead.alive.Close() // as the kernel does for a process that was killed
	temporary := func(name string) string { return filepath.Join(r.path, temporaryDir, name) }
	halfMade := strings.Repeat("0123456789abcdef", 2)
	if err := errors.Join(
		os.Mkdir(temporary(halfMade), 0o700),
		os.WriteFile(temporary(repositoryName), nil, 0o600), // of an init that was killed
	); err != nil {
		t.Fatal(err)
	}
	if removed, err := r.Sweep(ctx, time.Hour); err != nil || len(removed) > 0 {
		t.Errorf("swept what is not old: %v, %v", removed, err)
	}
	removed, err := r.Sweep(ctx, -time.Hour)
	want := []string{dead.dir, temporaryDir + "/" + halfMade, unfinishedName}
	slices.Sort(want)
	if diff := cmp.Diff(want, removed); err != nil || diff != "" {
		t.Errorf("swept (-want +got): %v\n%s", err, diff)
	}
	living.Absent(0, pageset.Run{Count: 20}, AbsentEvicted)
	i, err := living.Seal(ctx, Contents{})
	if err != nil {
		t.Fatal(err)
	}
	i.Close()
	if err := dead.Abort(); err != nil {
		t.Error(err)
	}
}

// TestDeleteTakesImagesOnly has directories beneath images/ that were not made here, and images of which little is left.
func TestDeleteTakesImagesOnly(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	id := strings.Repeat("0123456789abcdef", 2)
	for _, c := range []struct {
		files  []string
		delete bool
	}{
		{[]string{"holiday.jpg"}, false},
		{[]string{"2024/"}, false},
		{[]string{"manifest.json", "index", "icon.png"}, false}, // a web page's
		{[]string{"index/"}, true},                              // of an image, as far as can be told
		{[]string{"id.pages", "0123.pages"}, false},
		{nil, true},
		{[]string{manifestName}, true},
		{[]string{indexName, manifestName}, true},
		{[]string{macName, "added.txt"}, true},
		{[]string{stateName, "added.txt"}, true},
		{[]string{id + ".pages", ".nfs0001"}, true},
		{[]string{id + ".hashes", "added/"}, true},
	} {
		dir := filepath.Join(r.path, imagesDir, "it")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range c.files {
			path := filepath.Join(dir, name)
			err := os.Mkdir(path, 0o700)
			if !strings.HasSuffix(name, "/") {
				err = errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		err := r.Delete(ctx, "it")
		if c.delete && err != nil || !c.delete && !errors.Is(err, ErrNotImage) {
			t.Errorf("%v: %v", c.files, err)
		}
		left, err := os.ReadDir(dir)
		if c.delete != errors.Is(err, fs.ErrNotExist) || !c.delete && len(left) != len(c.files) {
			t.Errorf("%v: left: %v, %v", c.files, left, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(r.path, imagesDir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(ctx, "file"); !errors.Is(err, ErrNotImage) {
		t.Errorf("a file: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if left, err := names(r.root, temporaryDir); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestKilledWriter kills a process that writes an image: what it leaves is not touched before, and swept afterwards.
func TestKilledWriter(t *testing.T) {
	ctx := context.Background()
	if dir := os.Getenv("IMAGE_TEST_WRITER"); dir != "" {
		r, err := OpenRepository(dir, testKeys(false))
		if err == nil {
			_, err = r.Create(ctx, Spec{Name: "killed", Blocks: someBlocks})
		}
		fmt.Println("writing:", err)
		select {} // until killed
	}
	r := newRepository(t, testKeys(false))
	writer := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
	writer.Env = append(os.Environ(), "IMAGE_TEST_WRITER="+r.path)
	out, err := writer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	defer writer.Wait()
	defer writer.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "writing: <nil>\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) > 0 {
		t.Errorf("swept what belongs to a process that lives: %v, %v", removed, err)
	}
	if err := writer.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	writer.Wait()
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) != 1 {
		t.Errorf("swept %v, %v", removed, err)
	}
	if summaries, err := r.Images(ctx); err != nil || len(summaries) > 0 {
		t.Errorf("images: %v, %v", summaries, err)
	}
}

// TestConcurrently has writers make increments on images that others delete, and sweepers at work: whoever fails says
// that the parent is gone, and what is there is whole.
func TestConcurrently(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	mustSeal(t, r, Spec{Name: "base", Blocks: someBlocks})
	done := make(chan error)
	for n := range 4 {
		go func() {
			done <- func() error {
				parent := "base"
				for k := range 12 {
					name := fmt.Sprintf("image-%d-%d", n, k)
					p, err := r.Open(ctx, parent)
					if err != nil {
						return err
					}
					i, err := sealEmpty(r, Spec{Name: name, Parent: p, Blocks: someBlocks})
					p.Close()
					if err != nil {
						return err
					}
					i.Close()
					if k > 0 {
						if err := r.Delete(ctx, parent); err != nil {
							return err
						}
					}
					parent = name
					if _, err := r.Sweep(ctx, -time.Hour); err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	summaries, err := r.Images(ctx)
	if err != nil || len(summaries) != 5 {
		t.Fatalf("%d images, %v", len(summaries), err)
	}
	for _, s := range summaries {
		i, err := r.Open(ctx, s.Name)
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Verify(ctx, nil); err != nil {
			t.Error(err)
		}
		i.Close()
	}
}

// TestDeletedOnceTaken deletes a parent as soon as its files have been taken.
func TestDeletedOnceTaken(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	parent := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
	w := &Writer{repository: r, spec: Spec{Name: "child", Parent: parent, Blocks: someBlocks}}
	if err := w.checkParent(); err != nil {
		t.Fatal(err)
	}
	if err := w.enter(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(ctx, "parent"); err != nil {
		t.Fatal(err)
	}
	if err := w.parent.open(ctx); err != nil {
		t.Errorf("the parent was taken before: %v", err)
	}
	if err := w.discard(); err != nil {
		t.Error(err)
	}
}

// TestDeleteRaces deletes a parent while increments on it are begun.
func TestDeleteRaces(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	for round := range 20 {
		parent := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
		deleted := make(chan error)
		go func() { deleted <- r.Delete(ctx, "parent") }()
		w, err := r.Create(ctx, Spec{Name: fmt.Sprintf("image-%d", round), Parent: parent, Blocks: someBlocks})
		if err := <-deleted; err != nil {
			t.Fatal(err)
		}
		if err != nil {
			if unfit := new(ParentError); !errors.As(err, &unfit) || !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			continue
		}
		i, err := w.Seal(ctx, Contents{})
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Verify(ctx, nil); err != nil {
			t.Error(err)
		}
		i.Close()
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	for _, encrypted := range []bool{false, true} {
		path := filepath.Join(dir, fmt.Sprint("keys-", encrypted))
		made, err := NewKeyFile(path, encrypted)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		read, err := ParseKeys(text)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("others can read it: %v, %v", info.Mode(), err)
		}
		if made.Secret != read.Secret || (read.Encryption != nil) != encrypted || encrypted && *made.Encryption != *read.Encryption {
			t.Error("other keys were read than written")
		}
		if made.Secret == ([32]byte{}) {
			t.Error("no random secret")
		}
		if _, err := NewKeyFile(path, encrypted); !errors.Is(err, fs.ErrExist) {
			t.Errorf("written over: %v", err)
		}
		if text := fmt.Sprintf("%v %+v %s %x", made, made, made, &made); strings.Contains(text, fmt.Sprintf("%x", made.Secret)) {
			t.Errorf("keys in a message: %s", text)
		}
	}
	secret := "secret " + strings.Repeat("0a", 32)
	for _, text := range []string{"", "secret", "secret 0a", secret + "0a", secret + "\n" + secret, secret + "\nother " + strings.Repeat("0a", 32),
		"encryption " + strings.Repeat("0a", 32), strings.Repeat("#\n", 5000)} {
		if _, err := ParseKeys([]byte(text)); err == nil {
			t.Errorf("accepted %.100q", text)
		}
	}
	if _, err := ParseKeys([]byte("# a comment\n\n  " + secret + "  \n")); err != nil {
		t.Error(err)
	}
}

func TestCompression(t *testing.T) {
	noise := make([]byte, frameRawBytes)
	x := uint64(1)
	for i := range noise {
		x = x*6364136223846793005 + 1442695040888963407
		noise[i] = byte(x >> 56)
	}
	for _, how := range []Compression{None, Zstd, S2} {
		c, err := newCompressor(how)
		if err != nil {
			t.Fatal(err)
		}
		for name, raw := range map[string][]byte{"nothing": {}, "zeros": make([]byte, frameRawBytes), "noise": noise, "page": noise[:4096]} {
			stored, used := c.append([]byte("before"), raw)
			stored = stored[len("before"):]
			if len(stored) > len(raw) || used == None && !slices.Equal(stored, raw) {
				t.Errorf("%v of %s: %d bytes from %d by %v", how, name, len(stored), len(raw), used)
			}
			var d decompressor
			got := make([]byte, len(raw))
			if err := d.decompress(used, got, stored); err != nil || !slices.Equal(got, raw) {
				t.Errorf("%v of %s: %v", how, name, err)
			}
			if len(raw) > 0 {
				// Into less room than it needs, and more: the declared length is the one that holds.
				if err := d.decompress(used, make([]byte, len(raw)-1), stored); err == nil {
					t.Errorf("%v of %s: fits too little room", how, name)
				}
				if err := d.decompress(used, make([]byte, len(raw)+1), stored); err == nil {
					t.Errorf("%v of %s: fills too much room", how, name)
				}
			}
			d.close()
		}
		if parsed, err := ParseCompression(how.String()); err != nil || parsed != how {
			t.Errorf("%v: %v", how, err)
		}
	}
}
