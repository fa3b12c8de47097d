package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// increment makes an image on the base of smallImages, through every step that a writer has: pages stored, a run spilled,
// the parent's entries kept, files linked or copied, one of them dropped.
func increment(r *Repository, name string, parent *Image) (err error) {
	ctx := context.Background()
	w, err := r.Create(ctx, Spec{Name: name, Parent: parent, Blocks: parent.Manifest().Blocks, Compression: S2, Workers: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Abort()) }()
	w.table.limit = 3
	for n := range uint64(6) {
		b, err := w.Batch(ctx)
		if err != nil {
			return err
		}
		b.Pages = append(b.Pages, 20+n)
		b.Data = append(b.Data, make([]byte, pageset.PageBytes)...)
		b.Data[n] = 1
		w.Submit(b)
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	w.Absent(0, pageset.Run{First: 0, Count: 2}, AbsentEvicted)
	i, err := w.Seal(ctx, Contents{DeviceState: []byte("state")})
	if err != nil {
		return err
	}
	return i.Close()
}

// TestFaults fails every call to the file system, one after the other, and everything after it: nothing is to be seen
// and nothing left of the image, its parent is as it was, and the error says what the matter is.
func TestFaults(t *testing.T) {
	for _, fault := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
		for _, links := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v,links=%v", fault, links), func(t *testing.T) {
				ctx := context.Background()
				r := newRepository(t, testKeys(links))
				want := smallImages(t, r, Zstd)
				good := r.disk
				parent, err := r.Open(ctx, "increment")
				if err != nil {
					t.Fatal(err)
				}
				defer parent.Close()

				counting := &faultyDisk{disk: good, noLinks: !links}
				r.disk = counting
				if err := increment(r, "counted", parent); err != nil {
					t.Fatal(err)
				}
				if counting.calls < 20 {
					t.Fatalf("only %d calls that can fail", counting.calls)
				}
				files := openFiles(t)
				for n := 1; n <= counting.calls; n++ {
					r.disk = &faultyDisk{disk: good, noLinks: !links, fail: n, err: fault}
					err := increment(r, "failed", parent)
					if !errors.Is(err, fault) {
						t.Fatalf("call %d of %d: %v", n, counting.calls, err)
					}
					if space := new(SpaceError); errors.As(err, &space) != (fault == syscall.ENOSPC) {
						t.Errorf("call %d of %d: not the type of error to act on: %v", n, counting.calls, err)
					}
					if _, err := r.Open(ctx, "failed"); !errors.Is(err, ErrNotFound) {
						t.Fatalf("call %d of %d: opening the image: %v", n, counting.calls, err)
					}
					if left, err := names(r.root, temporaryDir); err != nil || len(left) > 0 {
						t.Fatalf("call %d of %d: left over: %v, %v", n, counting.calls, left, err)
					}
				}
				if now := openFiles(t); now > files {
					t.Errorf("%d files are still open", now-files)
				}
				r.disk = good
				if err := parent.Verify(ctx, nil); err != nil {
					t.Error(err)
				}
				checkLoad(t, parent, want)
				if err := increment(r, "failed", parent); err != nil {
					t.Errorf("the name is not free: %v", err)
				}
			})
		}
	}
}

// openFiles counts this process's open files, where the system shows them.
func openFiles(t *testing.T) int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Log("open files are not counted:", err)
	}
	return len(list)
}

// TestSpaceBeforeAndWhileWriting: room is looked at beforehand, and again while writing.
func TestSpaceBeforeAndWhileWriting(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	disk := &faultyDisk{disk: r.disk, free_: 1000}
	r.disk = disk
	blocks := []BlockInfo{{"ram", 256 << 20}}
	space := new(SpaceError)
	_, err := r.Create(ctx, Spec{Name: "image", Blocks: blocks, EstimateBytes: 900, ReserveBytes: 101})
	if !errors.As(err, &space) || space.Need != 1001 || space.Free != 1000 {
		t.Fatalf("Create: %v", err)
	}
	w, err := r.Create(ctx, Spec{Name: "image", Blocks: blocks, EstimateBytes: 900, ReserveBytes: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	disk.free_ = 99 // somebody else takes it
	for first := uint64(0); ; first += BatchPages {
		b, err := w.Batch(ctx)
		if err != nil {
			if !errors.As(err, &space) || space.Need != 100 || space.Free != 99 {
				t.Fatalf("Batch: %v", err)
			}
			return
		}
		for n := range uint64(BatchPages) {
			b.Pages = append(b.Pages, first+n)
		}
		b.Data = b.Data[:BatchBytes]
		for n := 0; n < BatchBytes; n += 4096 {
			b.Data[n], b.Data[n+1] = byte(first), 1
		}
		w.Submit(b)
		if first*pageset.PageBytes > 200<<20 {
			t.Fatal("200 MiB written below the reserve")
		}
	}
}

// TestSealAtItsEnd has things happen while an image becomes visible: Seal fails and there is none, or it is there.
func TestSealAtItsEnd(t *testing.T) {
	ctx := context.Background()
	start := func(t *testing.T, sync func(r *Repository, w *Writer, name string) error) (*Repository, *Writer) {
		r := newRepository(t, testKeys(false))
		var w *Writer
		plain := r.disk
		r.disk = &hookedDisk{disk: plain, sync: func(name string) error { return sync(r, w, name) }}
		w, err := r.Create(ctx, Spec{Name: "image", Blocks: someBlocks})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Abort() })
		w.Absent(0, pageset.Run{Count: 20}, AbsentEvicted)
		return r, w
	}
	invisible := func(t *testing.T, r *Repository, w *Writer) {
		t.Helper()
		if _, err := r.Open(ctx, "image"); !errors.Is(err, ErrNotFound) {
			t.Errorf("there is an image all the same: %v", err)
		}
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
		if left, err := names(r.root, temporaryDir); err != nil || len(left) > 0 {
			t.Errorf("left over: %v, %v", left, err)
		}
	}
	t.Run("damaged before", func(t *testing.T) {
		r, w := start(t, func(r *Repository, w *Writer, name string) error {
			if name != w.stage("") {
				return nil
			}
			return os.Truncate(r.path+"/"+w.stage(indexName), 100)
		})
		_, err := w.Seal(ctx, Contents{})
		if damage := new(DamageError); !errors.As(err, &damage) {
			t.Errorf("sealed what cannot be opened: %v", err)
		}
		invisible(t, r, w)
	})
	t.Run("deleted at once", func(t *testing.T) {
		_, w := start(t, func(r *Repository, w *Writer, name string) error {
			if name == imagesDir {
				if _, err := os.Lstat(r.path + "/" + imagePath("image")); err == nil {
					return r.Delete(ctx, "image")
				}
			}
			return nil
		})
		i, err := w.Seal(ctx, Contents{})
		if err != nil {
			t.Fatalf("what was sealed and then deleted: %v", err)
		}
		if i.Name() != "image" || i.Manifest().Pages.Evicted != 20 {
			t.Errorf("image %s with %+v", i.Name(), i.Manifest().Pages)
		}
		i.Close()
	})
	t.Run("not synced", func(t *testing.T) {
		r, w := start(t, func(r *Repository, w *Writer, name string) error {
			if name == imagesDir {
				return syscall.EIO
			}
			return nil
		})
		_, err := w.Seal(ctx, Contents{})
		if visible := new(VisibleError); !errors.Is(err, syscall.EIO) || errors.As(err, &visible) {
			t.Errorf("not synced: %v", err)
		}
		invisible(t, r, w)
	})
	t.Run("not synced, and no way back", func(t *testing.T) {
		r, w := start(t, func(r *Repository, w *Writer, name string) error {
			if name != imagesDir {
				return nil
			}
			return errors.Join(syscall.EIO, os.MkdirAll(r.path+"/"+w.stage("in the way"), 0o700))
		})
		_, err := w.Seal(ctx, Contents{})
		if visible := new(VisibleError); !errors.Is(err, syscall.EIO) || !errors.As(err, &visible) || visible.Image != "image" {
			t.Errorf("visible, and the error does not say so: %v", err)
		}
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
		i, err := r.Open(ctx, "image")
		if err != nil {
			t.Fatal(err)
		}
		i.Close()
	})
}

// TestExchangedCopies: on a volume without links, a copy is taken for one only if it is the file that was written.
func TestExchangedCopies(t *testing.T) {
	ctx := context.Background()
	for what, do := range map[string]func(path string) error{
		"another file": func(path string) error {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.WriteFile(path, content, 0o600)
		},
		"shorter": func(path string) error { return os.Truncate(path, 100) },
		"longer":  func(path string) error { return os.Truncate(path, 1<<20) },
		"closed":  nil,
	} {
		for _, kind := range []string{".pages", ".hashes"} {
			r := newRepository(t, testKeys(false))
			parent := mustSeal(t, r, Spec{Name: "parent", Blocks: someBlocks})
			own := parent.Manifest().ID.String() + kind
			hooked := &hookedDisk{disk: &faultyDisk{disk: r.disk, noLinks: true}, sync: func(string) error { return nil }}
			done := false
			hook := func(name string) error {
				if done || filepath.Base(name) != own {
					return nil
				}
				if done = true; do == nil {
					return syscall.EDQUOT
				}
				return do(filepath.Join(r.path, name))
			}
			if do == nil {
				hooked.close = hook
			} else {
				hooked.file = hook
			}
			r.disk = hooked
			w, err := r.Create(ctx, Spec{Name: "child", Parent: parent, Blocks: someBlocks})
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Seal(ctx, Contents{})
			if space := new(SpaceError); err == nil || do == nil && !errors.As(err, &space) {
				t.Errorf("%s, %s: %v", kind, what, err)
			}
			if damage := new(DamageError); errors.As(err, &damage) {
				t.Errorf("%s, %s: found only when the image was opened: %v", kind, what, err)
			}
			if !done {
				t.Errorf("%s, %s: nothing was done to it", kind, what)
			}
			if err := w.Abort(); err != nil {
				t.Error(err)
			}
		}
	}
}
