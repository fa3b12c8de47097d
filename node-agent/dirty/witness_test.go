package dirty

import (
	"testing"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// log is a source in the place of KVM's log. It looks at the first block alone.
type log struct {
	source
	blind bool
}

func (l *log) complete() bool { return !l.blind }
func (l *log) covered() Sets {
	if l.blind {
		return nil
	}
	covered := NewSets(twoBlocks)
	covered[0].AddAll()
	return covered
}

func TestWitness(t *testing.T) {
	for _, c := range []struct {
		name              string
		tables, log       Sets
		holes             Sets
		blind, nested     bool
		distrust, unlevel bool

		compared, alarm, doubted bool
		missed, unseen           uint64
	}{
		{name: "the same", tables: some(0, 1, 2), log: some(0, 1, 2), compared: true},
		{name: "devices wrote", tables: some(0, 1, 2, 3), log: some(0, 1), compared: true, unseen: 2},
		{name: "the tables missed one", tables: some(0, 1), log: some(0, 1, 7), compared: true, alarm: true, doubted: true, missed: 1},
		{name: "given back since", tables: some(0, 1), log: some(0, 1, 7), holes: some(0, 7), compared: true},
		{name: "of a nested guest", tables: some(0, 1), log: some(0, 1, 7), nested: true, compared: true, missed: 1},
		{name: "it does not look", tables: some(0, 1), log: some(0), blind: true},
		{name: "it counts from another time", tables: some(0, 1), log: some(0, 7), unlevel: true},
		{name: "distrust", tables: some(0, 1), log: some(0, 1), distrust: true, compared: true, doubted: true},
		{name: "where it does not look", tables: some(1, 1), log: some(0), compared: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			tables := &source{name: pageTablesName, complete: []bool{true, true}, found: c.tables, holes: c.holes}
			second := &log{source{name: kvmLogName, complete: []bool{false, false}, found: c.log}, c.blind}
			if c.holes == nil {
				tables.holes = NewSets(twoBlocks)
			}
			u, _ := unionOf(tables, second)
			u.level, u.nested, u.distrust = !c.unlevel, c.nested, c.distrust
			in, err := u.HarvestStanding(t.Context(), &standing{})
			if err != nil {
				t.Fatal(err)
			}
			if (in.Compared != nil) != c.compared || in.Compared.Alarm() != c.alarm || in.Doubted != c.doubted {
				t.Errorf("compared %+v, doubted %v", in.Compared, in.Doubted)
			}
			if in.Compared != nil && (in.Compared.Missed.Count() != c.missed || in.Compared.Unseen != c.unseen) {
				t.Errorf("missed %d, unseen %d; want %d and %d", in.Compared.Missed.Count(), in.Compared.Unseen, c.missed, c.unseen)
			}
			want := c.tables.Clone()
			want.Union(c.log)
			if c.doubted {
				want.AddAll()
			}
			if got := in.Pages.Count(); got != want.Count() {
				t.Errorf("%d pages, want %d", got, want.Count())
			}
			if c.doubted {
				expect(t, "pages", in.Pages[0], pageset.Run{First: 0, Count: twoBlocks[0].Pages()})
			}
			if _, err := in.Rearm(t.Context()); err != nil || !u.level {
				t.Errorf("re-arm: %v, level %v", err, u.level)
			}
		})
	}
}

// A page that was written in what was taken for a standstill is found although everything was doubted, and the sources are not level then.
func TestDoubtDoesNotHideABrokenStandstill(t *testing.T) {
	tables := &source{name: pageTablesName, complete: []bool{true, true}, found: some(0, 1), holes: NewSets(twoBlocks)}
	u, _ := unionOf(tables, &log{source: source{name: kvmLogName, complete: []bool{false, false}, found: some(0, 5)}})
	u.level = true
	in, err := u.HarvestStanding(t.Context(), &standing{})
	if err != nil || !in.Compared.Alarm() {
		t.Fatal(err, in.Compared)
	}
	tables.found = some(0, 1, 9)
	lost, err := in.Rearm(t.Context())
	if err == nil || u.level {
		t.Fatalf("re-arm: %v", err)
	}
	expect(t, "lost", lost[0], pageset.Run{First: 9, Count: 1})
}
