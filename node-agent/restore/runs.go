package restore

import (
	"bytes"
	"iter"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// chunks cuts a run into pieces of chunkPages at most.
func chunks(run pageset.Run) iter.Seq[pageset.Run] {
	return func(yield func(pageset.Run) bool) {
		for at := run.First; at < run.End(); {
			n := min(run.End()-at, chunkPages)
			if !yield(pageset.Run{First: at, Count: n}) {
				return
			}
			at += n
		}
	}
}

// within yields the parts of a run that are in the set.
func within(set *pageset.Set, run pageset.Run) iter.Seq[pageset.Run] { return parts(set, run, true) }

// without yields the parts of a run that are not in the set.
func without(set *pageset.Set, run pageset.Run) iter.Seq[pageset.Run] { return parts(set, run, false) }

func parts(set *pageset.Set, run pageset.Run, member bool) iter.Seq[pageset.Run] {
	return func(yield func(pageset.Run) bool) {
		for at := run.First; at < run.End(); {
			if set.Has(at) != member {
				at++
				continue
			}
			first := at
			for at < run.End() && set.Has(at) == member {
				at++
			}
			if !yield(pageset.Run{First: first, Count: at - first}) {
				return
			}
		}
	}
}

// nonzero yields the parts of a run whose pages have another content than zeros. data is that of the run.
func nonzero(data []byte, run pageset.Run) iter.Seq[pageset.Run] {
	return func(yield func(pageset.Run) bool) {
		rest := pageset.Run{First: run.First}
		for page := run.First; page < run.End(); page++ {
			at := (page - run.First) * pageset.PageBytes
			if !allZero(data[at : at+pageset.PageBytes]) {
				rest.Count++
				continue
			}
			if rest.Count > 0 && !yield(rest) {
				return
			}
			rest = pageset.Run{First: page + 1}
		}
		if rest.Count > 0 {
			yield(rest)
		}
	}
}

// allZero says whether there are only zeros in a page: it begins with one, and each byte is like the one before it.
func allZero(page []byte) bool {
	return page[0] == 0 && bytes.Equal(page[1:], page[:len(page)-1])
}
