package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// TestLeftovers tells what writers left from what lives, and says how much of the volume each takes.
func TestLeftovers(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	const written = 8 << 20
	blocks := []BlockInfo{{"ram", written}}
	create := func(name string, parent *Image) *Writer {
		w, err := r.Create(ctx, Spec{Name: name, Parent: parent, Blocks: blocks})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Abort() })
		return w
	}
	fill := func(w *Writer) {
		for first := uint64(0); first < written/pageset.PageBytes; first += BatchPages {
			b, err := w.Batch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			b.Data = b.Data[:BatchBytes]
			for n := range uint64(BatchPages) {
				b.Pages = append(b.Pages, first+n)
				b.Data[n*pageset.PageBytes] = 1
			}
			w.Submit(b)
		}
		if err := w.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	base := create("base", nil)
	fill(base)
	parent, err := base.Seal(ctx, Contents{})
	if err != nil {
		t.Fatal(err)
	}
	defer parent.Close()
	living, filled, linked := create("living", nil), create("filled", nil), create("linked", parent)
	fill(filled)
	for _, dead := range []*Writer{filled, linked} {
		dead.alive.Close() // as the kernel does for a process that was killed
	}

	list, err := r.Leftovers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[string]int64{}
	for i, l := range list {
		if age := time.Since(l.ModTime); age < -time.Minute || age > time.Minute {
			t.Errorf("%s is %v old", l.Path, age)
		}
		sizes[l.Path], list[i].Bytes = l.Bytes, 0
	}
	want := []Leftover{{Path: filled.dir}, {Path: linked.dir}, {Path: living.dir, Alive: true}}
	slices.SortFunc(want, func(a, b Leftover) int { return strings.Compare(a.Path, b.Path) })
	if diff := cmp.Diff(want, list, cmpopts.IgnoreFields(Leftover{}, "ModTime")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := sizes[filled.dir]; got < written || got > written+written/4 {
		t.Errorf("%d bytes were written, %d are left over", written, got)
	}
	if got := sizes[linked.dir]; got > written/4 {
		t.Errorf("%d bytes of files that the parent has as well are counted", got)
	}
	// To have asked changes nothing.
	dead := []string{filled.dir, linked.dir}
	slices.Sort(dead)
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || !slices.Equal(removed, dead) {
		t.Errorf("swept %v, %v", removed, err)
	}
	if list, err := r.Leftovers(ctx); err != nil || len(list) != 1 || !list[0].Alive {
		t.Errorf("left over: %+v, %v", list, err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Leftovers(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// TestSweepLeavesWhatIsNotOurs has somebody keep files of their own in tmp/.
func TestSweepLeavesWhatIsNotOurs(t *testing.T) {
	ctx := context.Background()
	r := newRepository(t, testKeys(false))
	at := func(name string) string { return filepath.Join(r.path, temporaryDir, name) }
	id := strings.Repeat("0123456789abcdef", 2)
	want := []string{"notes.txt", "work", strings.ToUpper(id), id[1:], id + "0", id, "link"}
	err := errors.Join(
		os.WriteFile(at(want[0]), []byte("mine"), 0o600),
		os.MkdirAll(at(want[1]+"/thesis"), 0o700),
		os.Mkdir(at(want[2]), 0o700),
		os.Mkdir(at(want[3]), 0o700),
		os.Mkdir(at(want[4]), 0o700),
		os.WriteFile(at(want[5]), nil, 0o600), // a file, where writers have directories
		os.Symlink("/", at(want[6])),
	)
	if err != nil {
		t.Fatal(err)
	}
	if removed, err := r.Sweep(ctx, -time.Hour); err != nil || len(removed) > 0 {
		t.Errorf("swept %v, %v", removed, err)
	}
	list, err := r.Leftovers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range list {
		if !l.Foreign || l.Alive {
			t.Errorf("%+v is not said to be somebody else's", l)
		}
		got = append(got, strings.TrimPrefix(l.Path, temporaryDir+"/"))
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	// A directory of that name instead of repository.json is not ours either.
	if err := os.Mkdir(at(repositoryName), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sweep(ctx, -time.Hour); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(at(repositoryName)); errors.Is(err, fs.ErrNotExist) {
		t.Error("swept a directory that is none of ours")
	}
}
