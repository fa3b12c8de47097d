package dirty

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/pagetable"
)

// sealed brings a session to where its record is valid and names an image, and returns the image.
func sealed(t *testing.T, s *Session) Image {
	t.Helper()
	image := Image{Name: "first", Digest: "c0ffee"}
	if err := s.Sealed(harvest(t, s), image); err != nil {
		t.Fatal(err)
	}
	return image
}

func recordFile(dir string, p Process) string { return filepath.Join(dir, recordName(p)) }

// editRecord changes the record on the disk.
func editRecord(t *testing.T, name string, edit func(map[string]any)) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	edit(fields)
	if text, err = json.Marshal(fields); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// What comes between two sessions, and whether the second may go on from the first one's image.
func TestGoingOn(t *testing.T) {
	type setting struct {
		t     *testing.T
		c     *child
		dir   string
		s     *Session
		image Image
	}
	file := func(e *setting) string { return recordFile(e.dir, e.c.process()) }
	for _, c := range []struct {
		name    string
		between func(*setting)
		reason  string // "" goes on
	}{
		{"nothing", func(*setting) {}, ""},
		{"fields of a newer agent", func(e *setting) {
			editRecord(e.t, file(e), func(f map[string]any) { f["fromTheFuture"] = []int{1} })
		}, ""},
		{"live harvest that was never sealed", func(e *setting) {
			e.s = e.c.open(e.dir)
			e.c.op("write", 0, 3, 1)
			if _, err := e.s.HarvestLive(e.t.Context()); err != nil {
				e.t.Fatal(err)
			}
			e.s.Close()
		}, "tracking state unknown: a capture was begun and its image not sealed"},
		{"standstill re-armed and never sealed", func(e *setting) {
			e.s = e.c.open(e.dir)
			harvest(e.t, e.s)
			e.s.Close()
		}, "tracking state unknown: a capture was begun and its image not sealed"},
		{"standstill not re-armed", func(e *setting) {
			e.s = e.c.open(e.dir)
			if _, err := e.s.HarvestStanding(e.t.Context(), &standing{}); err != nil {
				e.t.Fatal(err)
			}
			e.s.Close()
		}, ""},
		{"another image is the parent", func(e *setting) { e.image.Name = "other" },
			`tracking state unknown: tracking counts from image first, and not from the parent`},
		{"another manifest under the name", func(e *setting) { e.image.Digest = "00" },
			`tracking state unknown: tracking counts from another image that had the name first, of another repository or deleted since`},
		{"record removed", func(e *setting) { os.Remove(file(e)) }, "tracking state unknown: this host has no record of tracking"},
		{"record cut short", func(e *setting) { os.Truncate(file(e), 40) }, "tracking state unknown: session record: unexpected end of JSON input"},
		{"record emptied", func(e *setting) { os.Truncate(file(e), 0) }, "tracking state unknown: session record: unexpected end of JSON input"},
		{"record too large", func(e *setting) {
			if err := os.WriteFile(file(e), bytes.Repeat([]byte(" "), recordMaxBytes+1), 0o600); err != nil {
				e.t.Fatal(err)
			}
		}, "tracking state unknown: session record is larger than 1048576 bytes"},
		{"record of another version", func(e *setting) {
			editRecord(e.t, file(e), func(f map[string]any) { f["version"] = 9 })
		}, "tracking state unknown: session record has version 9"},
		{"record of another process", func(e *setting) {
			editRecord(e.t, file(e), func(f map[string]any) { f["process"] = Process{PID: 1, StartTime: 2} })
		}, "tracking state unknown: session record is of another process, pid 1"},
		{"record of another boot", func(e *setting) {
			editRecord(e.t, file(e), func(f map[string]any) { f["bootID"] = "another" })
		}, "tracking state unknown: session record is of another boot"},
		{"another layout", func(e *setting) {
			e.c.blocks[1].Bytes -= 4096
		}, "tracking state unknown: memory layout differs from the session record's"},
		{"record without an image", func(e *setting) {
			editRecord(e.t, file(e), func(f map[string]any) { delete(f, "image") })
		}, "tracking state unknown: session record names no image"},
		{"userfaultfd closed in the process", func(e *setting) {
			e.c.do(command{Op: "close", FD: remote(e.t, e.c)})
		}, "tracking state unknown: the process has no userfaultfd of this session"},
		{"userfaultfd replaced by another", func(e *setting) {
			e.c.do(command{Op: "close", FD: remote(e.t, e.c)})
			other := e.c.open(e.t.TempDir())
			other.Close()
		}, "tracking state unknown: the process has no userfaultfd of this session"},
		{"a session with a record elsewhere", func(e *setting) {
			other := e.c.open(e.t.TempDir())
			e.c.op("write", 0, 3, 1)
			harvest(e.t, other)
			other.Close()
		}, "tracking state unknown: the process has no userfaultfd of this session"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := &setting{t: t, c: startChild(t, area{Name: "ram", Pages: 64, Touch: true}, area{Name: "vram", Pages: 8, Touch: true}), dir: t.TempDir()}
			e.s = e.c.open(e.dir)
			e.image = sealed(t, e.s)
			if err := e.s.Close(); err != nil {
				t.Fatal(err)
			}
			c.between(e)
			e.c.op("write", 0, 9, 2)
			s := e.c.open(e.dir)
			got := ""
			if err := s.Since(e.image); err != nil {
				got = err.Error()
				if unknown := (*UnknownError)(nil); !errors.As(err, &unknown) {
					t.Errorf("error is a %T", err)
				}
			}
			if got != c.reason {
				t.Errorf("reason %q, want %q", got, c.reason)
			}
			in := harvest(t, s)
			if c.reason == "" {
				expect(t, "pages", in.Pages[0], pageset.Run{First: 9, Count: 2})
			} else if all := NewSets(e.c.blocks); true {
				all.AddAll()
				if in.Pages.Count() != all.Count() {
					t.Errorf("%d pages, want all", in.Pages.Count())
				}
			}
			// Either way the next image is one to count from.
			next := Image{Name: "next", Digest: "1"}
			if err := s.Sealed(in, next); err != nil {
				t.Fatal(err)
			}
			s.Close()
			e.c.op("write", 0, 11, 1)
			s = e.c.open(e.dir)
			if err := s.Since(next); err != nil {
				t.Error(err)
			}
			expect(t, "pages of the one after", harvest(t, s).Pages[0], pageset.Run{First: 11, Count: 1})
		})
	}
}

// remote returns the number of our userfaultfd in the child.
func remote(t *testing.T, c *child) int {
	t.Helper()
	found, err := trackers(c.pid())
	if err != nil || len(found) != 1 {
		t.Fatalf("userfaultfds in the child: %v, %v", found, err)
	}
	return found[0].FD
}

// The record is invalid on the disk before the first page is protected.
func TestInvalidBeforeRearming(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64, Touch: true})
	dir := t.TempDir()
	s := c.open(dir)
	sealed(t, s)
	valid := func() bool {
		r, err := readRecord(s.dir, c.process())
		if err != nil {
			t.Fatal(err)
		}
		return r.Valid
	}
	if !valid() {
		t.Fatal("not valid after the image was sealed")
	}
	c.op("write", 0, 1, 1)
	tables := s.sources[0].(*PageTables)
	tables.pagemap = watching{s.pagemap, func(args pagetable.ScanArgs) {
		if args.WriteProtect && valid() {
			t.Error("a protecting scan beside a valid record")
		}
	}}
	if _, err := s.HarvestLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	sealed(t, s)
	c.op("write", 0, 1, 1)
	harvest(t, s)

	// Where it cannot be made invalid, nothing is protected.
	sealed(t, s)
	c.op("write", 0, 1, 1)
	if err := os.Mkdir(filepath.Join(dir, recordName(c.process())+".new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.HarvestLive(t.Context()); err == nil {
		t.Error("live harvest though the record could not be written")
	}
	in, err := s.HarvestStanding(t.Context(), &standing{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Rearm(t.Context()); err == nil {
		t.Error("re-armed though the record could not be written")
	}
	if n, err := tables.Estimate(t.Context()); err != nil || n != 1 {
		t.Errorf("%d pages show as written, %v; want the one", n, err)
	}
}

type watching struct {
	scanner
	before func(pagetable.ScanArgs)
}

func (w watching) Scan(args pagetable.ScanArgs, visit func(pagetable.Region) error) error {
	w.before(args)
	return w.scanner.Scan(args, visit)
}

// Pages written after the harvest of a standstill that was none are never lost.
func TestBrokenStandstill(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64, Touch: true})
	s := c.open(t.TempDir())
	sealed(t, s)

	broken := &standing{err: errors.New("resumed")}
	if _, err := s.HarvestStanding(t.Context(), broken); !errors.Is(err, broken.err) {
		t.Errorf("harvest: %v", err)
	}

	c.op("write", 0, 5, 1)
	still := &standing{}
	in, err := s.HarvestStanding(t.Context(), still)
	if err != nil {
		t.Fatal(err)
	}
	// Another page of the same span and the harvested page again, unnoticed by the standstill.
	c.op("write", 0, 6, 1)
	if _, err := in.Rearm(t.Context()); err == nil {
		t.Error("re-armed in a standstill in which a page was written")
	}
	if unknown := (*UnknownError)(nil); !errors.As(s.Sealed(in, Image{"a", "0"}), &unknown) {
		t.Error("sealed with a page pending that the image does not have")
	}
	expect(t, "still pending", s.Pending()[0], pageset.Run{First: 6, Count: 1})

	// Here the standstill notices, after the re-arming.
	c.op("write", 0, 5, 1)
	in, err = s.HarvestStanding(t.Context(), still)
	if err != nil {
		t.Fatal(err)
	}
	s.sources[0].(*PageTables).pagemap = watching{s.pagemap, func(args pagetable.ScanArgs) {
		if args.WriteProtect {
			c.op("write", 0, 5, 1)
			still.err = errors.New("resumed")
		}
	}}
	if _, err := in.Rearm(t.Context()); !errors.Is(err, still.err) {
		t.Errorf("re-armed in a broken standstill: %v", err)
	}
	_ = s.Sealed(in, Image{"b", "0"})
	expect(t, "still pending", s.Pending()[0], pageset.Run{First: 5, Count: 1})
}

// A write between the look of a live harvest and its protecting scan is in the harvest.
func TestWriteBetweenLookAndProtect(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 1024, Touch: true})
	s := c.open(t.TempDir())
	sealed(t, s)
	c.op("write", 0, 5, 1)
	s.sources[0].(*PageTables).pagemap = watching{s.pagemap, func(args pagetable.ScanArgs) {
		if args.WriteProtect {
			c.op("write", 0, 6, 1)
		}
	}}
	h, err := s.HarvestLive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "written", h.Written[0], pageset.Run{First: 5, Count: 2})
}

// A scan that fails while it protects may have protected pages that it never reported.
func TestFailureWhileProtecting(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 2048, Touch: true})
	s := c.open(t.TempDir())
	image := sealed(t, s)
	c.op("write", 0, 5, 1)
	failure := errors.New("scan failed")
	s.sources[0].(*PageTables).pagemap = failing{s.pagemap, failure}
	h, err := s.HarvestLive(t.Context())
	if err != nil || !errors.Is(h.Unknown, failure) {
		t.Fatalf("%v, %+v", err, h)
	}
	if s.Pending().Count() != 2048 {
		t.Errorf("%d pages pending, want all", s.Pending().Count())
	}
	c.op("write", 0, 700, 1) // the failed harvest protected page 5: without this there is nothing to protect
	in, err := s.HarvestStanding(t.Context(), &standing{})
	if err != nil || in.Pages.Count() != 2048 {
		t.Errorf("instant after a failure: %v, %d pages", err, in.Pages.Count())
	}
	if _, err := in.Rearm(t.Context()); !errors.Is(err, failure) {
		t.Errorf("rearm: %v", err)
	}
	if s.Sealed(in, image) == nil {
		t.Error("sealed though nothing is known of what was re-armed")
	}
	if r, err := readRecord(s.dir, c.process()); err != nil || r.Valid {
		t.Errorf("record: %+v, %v", r, err)
	}
}

type failing struct {
	scanner
	err error
}

func (f failing) Scan(args pagetable.ScanArgs, visit func(pagetable.Region) error) error {
	if err := f.scanner.Scan(args, visit); err != nil {
		return err
	}
	if args.WriteProtect {
		return f.err
	}
	return nil
}

func TestOneSessionAtATime(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64})
	dir := t.TempDir()
	s := c.open(dir)
	_, err := Open(t.Context(), c.process(), c.blocks, dir, Options{})
	busy := (*BusyError)(nil)
	if !errors.Is(err, ErrBusy) || !errors.As(err, &busy) || busy.Holder != os.Getpid() {
		t.Errorf("second session: %v", err)
	}
	busy = nil
	if err := Busy(dir, c.process()); !errors.As(err, &busy) || busy.Holder != os.Getpid() {
		t.Errorf("a look at it: %v", err)
	}
	if _, err := Release(t.Context(), c.process(), dir); !errors.Is(err, ErrBusy) {
		t.Errorf("release of an open session: %v", err)
	}
	s.Close()
	c.open(dir)
}

// TestAbandonedPipes stay open for a while and no longer, over any number of captures that were killed.
func TestAbandonedPipes(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 1, Touch: true})
	dir := t.TempDir()
	var pipes []inject.RemoteFile
	for i := range 4 {
		s := c.open(dir)
		var killed *inject.RemoteFile
		if l := s.Leash(); l != nil {
			killed = &l.Pipe
		}
		if err := s.AbandonPipe(t.Context(), killed, time.Duration(i)*abandonedFor*2/3); err != nil {
			t.Fatal(err)
		}
		pipe, err := inject.NewPipe(t.Context(), c.pid())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetLeash(&Leash{Pipe: pipe}); err != nil {
			t.Fatal(err)
		}
		s.Close()
		pipes = append(pipes, pipe)
	}
	// The first was abandoned at two thirds of the time and looked at when two thirds, and four, had passed since.
	for i, open := range []bool{false, true, true, true} {
		if err := pipes[i].Check(c.pid()); (err == nil) != open {
			t.Errorf("pipe %d: want open %v, got %v", i, open, err)
		}
	}
}

func TestRelease(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 20000, Touch: true}, area{Name: "shm", Pages: 600, Shared: true, Touch: true})
	dir := t.TempDir()
	s := c.open(dir)
	pipe, err := inject.NewPipe(t.Context(), c.pid())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetLeash(&Leash{Pipe: pipe, Idle: true, StreamBytes: 123, Sections: json.RawMessage(`["timer"]`)}); err != nil {
		t.Fatal(err)
	}
	image := sealed(t, s)
	s.Close()
	s = c.open(dir)
	if diff := cmp.Diff(pipe, s.Leash().Pipe); diff != "" || s.Leash().StreamBytes != 123 {
		t.Errorf("leash: %+v", s.Leash())
	}
	if got, err := s.Image(); err != nil || got != image {
		t.Errorf("image: %v, %v", got, err)
	}
	s.Close()
	if tracked, err := Release(t.Context(), c.process(), dir); err != nil || !tracked {
		t.Fatal(tracked, err)
	}
	mappings, err := pagetable.Mappings(c.pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mappings {
		if m.Flags.WriteProtectRegistered() {
			t.Errorf("[%#x,%#x) is still registered", m.Start, m.End)
		}
	}
	if found, err := trackers(c.pid()); err != nil || len(found) > 0 {
		t.Errorf("userfaultfds left: %v, %v", found, err)
	}
	if err := pipe.Check(c.pid()); !errors.Is(err, inject.ErrIdentity) {
		t.Errorf("pipe: %v", err)
	}
	if tracked, err := Release(t.Context(), c.process(), dir); err != nil || tracked {
		t.Errorf("release of what is released: %v, tracked %v", err, tracked)
	}
	// The next session says why it knows nothing.
	s = c.open(dir)
	defer s.Close()
	if err := s.Since(image); err == nil || err.Error() != "tracking state unknown: "+reasonReleased {
		t.Errorf("after it: %v", err)
	}
	if s.Leash() != nil {
		t.Errorf("a leash of before: %+v", s.Leash())
	}
}

func TestSweep(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64})
	dir := t.TempDir()
	c.open(dir).Close()
	for _, name := range []string{"1234567890-1.json", "1234567890-1.lock", "1234567890-1.json.new", "1-2.json", "notes.json"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := Sweep(dir); n != 2 || err != nil {
		t.Errorf("swept %d processes, %v; want 2", n, err)
	}
	var left []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if diff := cmp.Diff([]string{recordName(c.process()), lockName(c.process()), "notes.json"}, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	if n, err := Sweep(filepath.Join(dir, "none")); n != 0 || err != nil {
		t.Errorf("no directory: %d, %v", n, err)
	}
}

func TestRecordOnDisk(t *testing.T) {
	name := t.TempDir()
	dir, err := os.OpenRoot(name)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	want := &Record{
		Version: recordVersion, Process: Process{PID: 12, StartTime: 34}, BootID: "b", LayoutDigest: "d", Valid: true,
		Image: Image{"i", "00"}, Updated: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Userfaultfd: inject.RemoteFile{FD: 7, Device: 8, Inode: 9, Link: userfaultfdLink},
	}
	for range 2 { // over an older one too
		if err := writeRecord(dir, want); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readRecord(dir, want.Process)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	info, err := os.Stat(recordFile(name, want.Process))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// A path planted in the record directory leads nowhere.
func TestRecordThroughLink(t *testing.T) {
	name, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "target")
	p := Process{PID: 12, StartTime: 34}
	if err := os.WriteFile(elsewhere, []byte(`{"version":1,"process":{"pid":12,"startTime":34},"valid":true}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, recordFile(name, p)); err != nil {
		t.Fatal(err)
	}
	dir, err := os.OpenRoot(name)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if r, err := readRecord(dir, p); err == nil {
		t.Errorf("read %+v through a link", r)
	}
}

func TestLayoutChecked(t *testing.T) {
	good := []Block{{Name: "a", HVA: 1 << 20, Bytes: 8192, HostPageBytes: 4096}, {Name: "b", HVA: 1<<20 + 8192, Bytes: 4096, HostPageBytes: 4096}}
	if err := checkLayout(good); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func([]Block){
		"overlap":        func(b []Block) { b[1].HVA -= 4096 },
		"empty":          func(b []Block) { b[0].Bytes = 0 },
		"part of a page": func(b []Block) { b[0].Bytes = 5000 },
		"unaligned":      func(b []Block) { b[0].HVA++ },
		"too far":        func(b []Block) { b[1].HVA = ^uint64(4095) },
		"page size":      func(b []Block) { b[0].HostPageBytes = 5000 },
	} {
		bad := append([]Block(nil), good...)
		spoil(bad)
		if err := checkLayout(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	other := append([]Block(nil), good...)
	other[1].Name = "c"
	if LayoutDigest(good) == LayoutDigest(other) {
		t.Error("two layouts with one digest")
	}
}

// The record says when it was written and of which boot it is.
func TestRecordNamesTimeAndBoot(t *testing.T) {
	c := startChild(t, area{Name: "ram", Pages: 64, Touch: true})
	dir, at := t.TempDir(), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	options := Options{Now: func() time.Time { return at }, BootID: func() (string, error) { return "boot one", nil }}
	s, err := Open(t.Context(), c.process(), c.blocks, dir, options)
	if err != nil {
		t.Fatal(err)
	}
	image := sealed(t, s)
	if r, err := readRecord(s.dir, c.process()); err != nil || !r.Updated.Equal(at) || r.BootID != "boot one" || !r.Valid {
		t.Errorf("record %+v, %v", r, err)
	}
	s.Close()
	options.BootID = func() (string, error) { return "boot two", nil }
	if s, err = Open(t.Context(), c.process(), c.blocks, dir, options); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Since(image); err == nil {
		t.Error("the session goes on from an image of another boot")
	}
}
