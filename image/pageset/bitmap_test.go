package pageset

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

func TestAddBitmap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		size := 1 + rng.Uint64N(400)
		first := rng.Uint64N(size)
		pages := rng.Uint64N(size - first + 1)
		bitmap := make([]byte, (pages+63)/64*8)
		for at := 0; at < len(bitmap); at += 8 {
			binary.LittleEndian.PutUint64(bitmap[at:], rng.Uint64()&rng.Uint64())
		}
		got := New(size)
		got.AddBitmap(first, pages, bitmap)
		for page := range size {
			want := page >= first && page < first+pages && bitmap[(page-first)/8]>>((page-first)%8)&1 != 0
			if got.Has(page) != want {
				t.Fatalf("page %d of %d, bitmap for %v: is a member %v, want %v", page, size, Run{first, pages}, got.Has(page), want)
			}
		}
		if n := got.Count(); n > pages {
			t.Fatalf("%d members of %d", n, pages)
		}
	}
}
