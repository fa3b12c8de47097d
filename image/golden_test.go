package image_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/minio/highwayhash"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
)

var update = flag.Bool("update", false, "write the golden repositories anew")

// The golden repositories pin the format: today's writer has to produce them, and today's reader to read them, byte for byte. Where
// compression is in play a later library may compress otherwise, so those are only read.
var goldens = []struct {
	name        string
	compression image.Compression
	encrypted   bool
	reproduced  bool
}{
	{"plain", image.None, false, true},
	{"encrypted", image.None, true, true},
	{"zstd-encrypted", image.Zstd, true, false},
	{"s2", image.S2, false, false},
}

func goldenKeys(encrypted bool) image.Keys {
	var keys image.Keys
	for i := range keys.Secret {
		keys.Secret[i] = byte(i)
	}
	if encrypted {
		keys.Encryption = new([32]byte)
		for i := range keys.Encryption {
			keys.Encryption[i] = byte(255 - i)
		}
	}
	return keys
}

var goldenBlocks = []image.BlockInfo{{Name: "pc.ram", Bytes: 64 * 4096}, {Name: "none", Bytes: 0}, {Name: "vga.vram", Bytes: 2 * 4096}}

// goldenPage is page number page of a block after it was written for the n-th time.
func goldenPage(block int, page uint64, n int) []byte {
	content := make([]byte, pageset.PageBytes)
	for line := 0; line < len(content); line += 64 {
		copy(content[line:], fmt.Sprintf("block %d page %d written %d line %d", block, page, n, line/64))
	}
	return content
}

// goldenImages are the images, each with what it changes of the one before.
var goldenImages = []struct {
	name    string
	pages   map[int][]uint64 // by block: pages written, as goldenPage has them
	words   map[uint64]byte  // pages of the first block that are filled with a byte
	same    []uint64         // pages of the first block that are submitted as they are
	absent  []pageset.Run    // of the first block
	why     image.Absence
	devices string
}{
	{
		name:   "base",
		pages:  map[int][]uint64{0: {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 40}, 2: {0, 1}},
		words:  map[uint64]byte{4: 0, 21: 0xcc, 22: 0xcc},
		absent: []pageset.Run{{First: 23, Count: 17}, {First: 41, Count: 23}}, why: image.AbsentUnpopulated,
		devices: "the devices of the base",
	},
	{
		name:   "increment",
		pages:  map[int][]uint64{0: {2, 30, 31}},
		words:  map[uint64]byte{40: 1},
		same:   []uint64{0, 1, 3, 21},
		absent: []pageset.Run{{First: 9, Count: 3}}, why: image.AbsentEvicted,
		devices: "the devices of the increment",
	},
	{
		name:    "second-increment",
		pages:   map[int][]uint64{0: {9}, 2: {1}},
		devices: "",
	},
}

// goldenState is what an image has to be read as.
func goldenState(upTo int) *strangeImage {
	s := &strangeImage{blocks: map[string][]byte{}, kinds: map[string][]byte{}}
	for _, b := range goldenBlocks {
		s.blocks[b.Name], s.kinds[b.Name] = make([]byte, b.Bytes), make([]byte, b.Bytes/4096)
	}
	put := func(block int, page uint64, kind byte, content []byte) {
		name := goldenBlocks[block].Name
		s.kinds[name][page] = kind
		clear(s.blocks[name][page*4096:][:4096])
		copy(s.blocks[name][page*4096:], content)
	}
	for n, i := range goldenImages[:upTo+1] {
		for block, pages := range i.pages {
			for _, p := range pages {
				put(block, p, 's', goldenPage(block, p, n))
			}
		}
		for p, b := range i.words {
			put(0, p, 'w', bytes.Repeat([]byte{b}, 4096))
		}
		for _, r := range i.absent {
			for p := r.First; p < r.End(); p++ {
				put(0, p, "ue"[i.why], nil)
			}
		}
		s.state = []byte(i.devices)
	}
	return s
}

// writeGolden writes a golden repository.
func writeGolden(t *testing.T, dir string, how image.Compression, encrypted bool) {
	t.Helper()
	ctx := context.Background()
	random := rand.NewChaCha8([32]byte{1})
	if err := image.InitRepositoryWith(dir, random); err != nil {
		t.Fatal(err)
	}
	r, err := image.OpenRepository(dir, goldenKeys(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var parent *image.Image
	for n, i := range goldenImages {
		now := time.Date(2026, 11, 22, 12, n, 0, 123456789, time.UTC)
		w, err := r.Create(ctx, image.Spec{
			Name: i.name, Parent: parent, Blocks: goldenBlocks, Compression: how, Workers: 1,
			Clock: func() time.Time { return now }, Random: random,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		before := goldenState(n) // the pages submitted as they are, are the same in it
		for block := range goldenBlocks {
			b, err := w.Batch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			b.Block = block
			for p := range goldenBlocks[block].Bytes / 4096 {
				submitted := false
				for _, q := range i.pages[block] {
					submitted = submitted || p == q
				}
				if block == 0 {
					_, word := i.words[p]
					submitted = submitted || word
					for _, q := range i.same {
						submitted = submitted || p == q
					}
				}
				if submitted {
					b.Pages = append(b.Pages, p)
					b.Data = append(b.Data, before.blocks[goldenBlocks[block].Name][p*4096:][:4096]...)
				}
			}
			w.Submit(b)
		}
		for _, run := range i.absent {
			w.Absent(0, run, i.why)
		}
		if parent != nil {
			parent.Close()
		}
		parent, err = w.Seal(ctx, image.Contents{
			DeviceState: []byte(i.devices),
			Machine:     json.RawMessage(`{"type": "pc-q35-10.0", "memory": [1, 2]}`),
			Attributes:  map[string]string{"vm": "default/guest", "a": "1"},
			Report:      json.RawMessage(`{"pause": "3ms"}`),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	parent.Close()
	// What is no part of the format.
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "tmp")); err != nil {
		t.Fatal(err)
	}
}

func readTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		tree[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestGolden(t *testing.T) {
	ctx := context.Background()
	for _, g := range goldens {
		t.Run(g.name, func(t *testing.T) {
			dir := filepath.Join("testdata", "golden", g.name)
			if *update {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
				writeGolden(t, dir, g.compression, g.encrypted)
			}
			if g.reproduced {
				again := t.TempDir()
				writeGolden(t, again, g.compression, g.encrypted)
				want, got := readTree(t, dir), readTree(t, again)
				for name := range want {
					if want[name] != got[name] {
						t.Errorf("%s is not written as it was", name)
					}
				}
				if len(want) != len(got) {
					t.Errorf("%d files are written, want %d", len(got), len(want))
				}
			}
			keys := goldenKeys(g.encrypted)
			r, err := image.OpenRepository(dir, keys)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			for n, want := range goldenImages {
				i, err := r.Open(ctx, want.name)
				if err != nil {
					t.Fatal(err)
				}
				defer i.Close()
				if err := i.Verify(ctx, nil); err != nil {
					t.Error(err)
				}
				compareImages(t, "Load of "+want.name, goldenState(n), loadAll(t, i))
			}
		})
	}
}

// loadAll reads an image through the package.
func loadAll(t *testing.T, i *image.Image) *strangeImage {
	t.Helper()
	ctx := context.Background()
	s := &strangeImage{blocks: map[string][]byte{}, kinds: map[string][]byte{}}
	m := i.Manifest()
	for _, b := range m.Blocks {
		s.blocks[b.Name], s.kinds[b.Name] = make([]byte, b.Bytes), make([]byte, b.Bytes/4096)
	}
	var mu sync.Mutex
	err := i.Load(ctx, image.LoadOptions{}, func(span image.Span) error {
		mu.Lock()
		defer mu.Unlock()
		name := m.Blocks[span.Block].Name
		for n := range span.Run.Count {
			s.kinds[name][span.Run.First+n] = "uews"[span.Kind]
			for w := range uint64(4096 / 8) {
				if span.Kind == image.Uniform {
					for k := range uint64(8) {
						s.blocks[name][(span.Run.First+n)*4096+w*8+k] = byte(span.Word >> (8 * k))
					}
				}
			}
		}
		copy(s.blocks[name][span.Run.First*4096:], span.Data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.state, err = i.DeviceState(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func compareImages(t *testing.T, what string, want, got *strangeImage) {
	t.Helper()
	if diff := cmp.Diff(want.kinds, got.kinds); diff != "" {
		t.Errorf("%s: kinds of pages (-want +got):\n%s", what, diff)
	}
	for name := range want.blocks {
		if !bytes.Equal(want.blocks[name], got.blocks[name]) {
			t.Errorf("%s: content of block %s differs", what, name)
		}
	}
	if !bytes.Equal(want.state, got.state) {
		t.Errorf("%s: device state %q, want %q", what, got.state, want.state)
	}
}

// TestStranger has the reader that knows the document alone read the golden repositories.
func TestStranger(t *testing.T) {
	for _, g := range goldens {
		for n, want := range goldenImages {
			keys := goldenKeys(g.encrypted)
			var encryption []byte
			if g.encrypted {
				encryption = keys.Encryption[:]
			}
			got, err := readStrangely(filepath.Join("testdata", "golden", g.name), want.name, keys.Secret[:], encryption)
			if err != nil {
				t.Errorf("%s/%s: %v", g.name, want.name, err)
				continue
			}
			compareImages(t, g.name+"/"+want.name, goldenState(n), got)
		}
	}
}

// TestStrangerReadsLargeImages has it read an image of several segments and blocks of hashes.
func TestStrangerReadsLargeImages(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if err := image.InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	keys := goldenKeys(false)
	r, err := image.OpenRepository(dir, keys)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const pages = 12_000
	w, err := r.Create(ctx, image.Spec{Name: "large", Blocks: []image.BlockInfo{{Name: "ram", Bytes: pages * 4096}}, Compression: image.S2})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for first := uint64(0); first < pages; first += 250 {
		b, err := w.Batch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for p := first; p < first+250; p++ {
			content := make([]byte, 4096)
			if p%5 == 0 {
				copy(content, goldenPage(0, p, 0)[:100])
			} else if p%2 == 0 {
				content = bytes.Repeat([]byte{byte(p)}, 4096)
			}
			b.Pages, b.Data = append(b.Pages, p), append(b.Data, content...)
		}
		w.Submit(b)
	}
	i, err := w.Seal(ctx, image.Contents{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	got, err := readStrangely(dir, "large", keys.Secret[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	compareImages(t, "large", loadAll(t, i), got)
}

// TestImageWithoutPages has both readers read images that have no index to speak of.
func TestImageWithoutPages(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if err := image.InitRepository(dir); err != nil {
		t.Fatal(err)
	}
	keys := goldenKeys(false)
	r, err := image.OpenRepository(dir, keys)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for name, blocks := range map[string][]image.BlockInfo{"no-blocks": nil, "empty-block": {{Name: "none"}}} {
		w, err := r.Create(ctx, image.Spec{Name: name, Blocks: blocks, Compression: image.Zstd})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		i, err := w.Seal(ctx, image.Contents{DeviceState: []byte("state")})
		if err != nil {
			t.Fatal(err)
		}
		defer i.Close()
		if err := i.Verify(ctx, nil); err != nil {
			t.Error(err)
		}
		if m := i.Manifest(); m.Index.Bytes != 64+48 || m.Index.Directory != 64 || len(m.Data) != 0 {
			t.Errorf("%s: index %+v, data files %v", name, m.Index, m.Data)
		}
		got, err := readStrangely(dir, name, keys.Secret[:], nil)
		if err != nil {
			t.Fatal(err)
		}
		compareImages(t, name, loadAll(t, i), got)
	}
}

// TestStrangerVectors holds what the document says in words against its test vectors.
func TestStrangerVectors(t *testing.T) {
	secret, encryption, repository, id, page := image.VectorInput()
	got := map[string]string{}
	note := func(what string, value []byte) { got[what] = hex.EncodeToString(value) }
	key := func(name, purpose string, material []byte) []byte {
		k := strangeDerive("vmckpt.io 2026 image v1 "+purpose, material)
		note("K<sub>"+name+"</sub>", k)
		return k
	}
	mac, tag := key("mac", "manifest MAC", secret[:]), key("tag", "record tag", secret[:])
	pages, files := key("page", "page hash", secret[:]), key("file", "file digest", secret[:])
	check := key("check", "key check", secret[:])
	aead := key("aead", "record encryption", append(secret[:], encryption[:]...))
	note("secret check", strangeKeyed(check, 16, []byte("secret"), repository[:]))
	note("encryption check", strangeKeyed(aead, 16, []byte("encryption"), repository[:]))
	note("MAC of a manifest of the bytes `{}`", strangeKeyed(mac, 32, []byte("{}")))
	hash := highwayhash.Sum128(page, pages)
	note("hash of the page", hash[:])
	digest := highwayhash.Sum(page, files)
	note("digest of a file that is the page, and nothing else", digest[:])
	for how, key := range map[string][]byte{"plain": tag, "encrypted": aead} {
		encrypted := how == "encrypted"
		flag := byte(0)
		if encrypted {
			flag = 1
		}
		head := bytes.Join([][]byte{[]byte("VMCKPT01PAGE"), {flag, 0, 0, 0}, id[:], repository[:]}, nil)
		note(how+": tag of the file header", strangeKeyed(tag, 16, head))
		record := append([]byte("PAGE"), 0, 1, 0, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		gcm := try(cipher.NewGCM(try(aes.NewCipher(strangeKeyed(key, 32, []byte("PAGE"), id[:])))))
		nonce := []byte{64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		if encrypted {
			sealed := gcm.Seal(nil, nonce, page, record)
			note("encrypted: first 16 bytes of the record's payload", sealed[:16])
			note("encrypted: tag of the record", sealed[4096:])
		} else {
			note("plain: tag of the record", gcm.Seal(nil, nonce, nil, append(record, page...)))
		}
	}
	if diff := cmp.Diff(image.DocumentedVectors(t), got); diff != "" {
		t.Errorf("(-document +stranger):\n%s", diff)
	}
}
