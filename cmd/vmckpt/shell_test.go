package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// mainVariable makes the test binary the program itself, so that tests start the same binary that users have.
const mainVariable = "VMCKPT_TEST_MAIN"

func TestMain(m *testing.M) {
	asOldKernel()
	// First of all: a worker that ran the tests would start workers that do.
	asHelper()
	if os.Getenv(mainVariable) != "" {
		main()
	}
	os.Exit(m.Run())
}

// shell runs commands in this process, on a repository of the test's own.
type shell struct {
	t         *testing.T
	repo, key string
}

// newShell makes a repository.
func newShell(t *testing.T) *shell {
	s := &shell{t: t, repo: filepath.Join(t.TempDir(), "repository"), key: filepath.Join(t.TempDir(), "key")}
	s.ok("init")
	return s
}

// run runs a command line and returns what it printed, and its exit code.
func (s *shell) run(args ...string) (stdout, stderr string, exit int) {
	s.t.Helper()
	env := map[string]string{repositoryVariable: s.repo, keyVariable: s.key}
	return runWith(s.t, env, args...)
}

func runWith(t *testing.T, env map[string]string, args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	var out, err bytes.Buffer
	p := &program{
		stdout: &out, stderr: &err,
		getenv: func(name string) string { return env[name] },
		now:    time.Now,
	}
	exit = p.run(t.Context(), args)
	return out.String(), err.String(), exit
}

// ok runs a command that must succeed and returns its answer.
func (s *shell) ok(args ...string) string {
	s.t.Helper()
	stdout, stderr, exit := s.run(args...)
	if exit != 0 || stderr != "" {
		s.t.Fatalf("vmckpt %s: exit code %d, standard error:\n%s", strings.Join(args, " "), exit, stderr)
	}
	return stdout
}

// json runs a command with --output json, whose standard output must be one JSON value that T knows all fields of.
func runJSON[T any](s *shell, wantExit int, args ...string) T {
	s.t.Helper()
	stdout, stderr, exit := s.run(append(args, "--output", "json")...)
	if exit != wantExit {
		s.t.Fatalf("vmckpt %s: exit code %d, want %d; standard error:\n%s", strings.Join(args, " "), exit, wantExit, stderr)
	}
	var v T
	d := json.NewDecoder(strings.NewReader(stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		s.t.Fatalf("vmckpt %s: %v in:\n%s", strings.Join(args, " "), err, stdout)
	}
	if d.More() {
		s.t.Fatalf("vmckpt %s: more than one JSON value:\n%s", strings.Join(args, " "), stdout)
	}
	return v
}

// open opens the repository.
func (s *shell) open() *image.Repository {
	s.t.Helper()
	keys, err := jobs.Repository{Dir: s.repo, KeyFile: s.key}.Keys()
	if err != nil {
		s.t.Fatal(err)
	}
	r, err := image.OpenRepository(s.repo, keys)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { r.Close() })
	return r
}

// blocks are those of the small machine that the tests' images are of.
var blocks = []image.BlockInfo{{Name: "pc.ram", Bytes: 1 << 20}, {Name: "/rom@etc/acpi/tables", Bytes: 128 << 10}}

// zeroTime is when the first image was made; each further one is a minute later.
var zeroTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// write makes an image with count pages that no other image has, from page first on; the rest is uniform or the parent's.
func (s *shell) write(name, parent string, minute int, first, count uint64) {
	s.t.Helper()
	t := s.t
	repository := s.open()
	spec := image.Spec{Name: name, Blocks: blocks, Compression: image.Zstd, Workers: 1,
		Clock: func() time.Time { return zeroTime.Add(time.Duration(minute) * time.Minute) }}
	report := capture.Result{Image: name, Parent: parent, Instant: spec.Clock().Add(-time.Second), Duration: 250 * time.Millisecond,
		Downtime: 6700 * time.Microsecond, Attempts: 1,
		Phases: []capture.Phase{{Name: "copy", Duration: 200 * time.Millisecond}},
		Pauses: []capture.Pause{{For: "instant", Total: 6700 * time.Microsecond, Exact: true,
			Parts: []capture.Phase{{Name: "stop", Duration: 900 * time.Microsecond}, {Name: "scan", Duration: 2 * time.Millisecond}}}}}
	if parent != "" {
		p, err := repository.Open(t.Context(), parent)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		spec.Parent, report.Source = p, "page tables"
	}
	w, err := repository.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for block, info := range blocks {
		run := pageset.Run{First: 0, Count: info.Bytes / pageset.PageBytes}
		if parent == "" {
			w.Absent(block, run, image.AbsentUnpopulated)
		}
	}
	b, err := w.Batch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for page := first; page < first+count; page++ {
		content := bytes.Repeat([]byte(name+" "), pageset.PageBytes)[:pageset.PageBytes]
		content[0] = byte(page)
		b.Pages, b.Data = append(b.Pages, page), append(b.Data, content...)
	}
	w.Submit(b)
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	i, err := w.Seal(t.Context(), image.Contents{DeviceState: []byte("QEVM"), Report: text,
		Machine: json.RawMessage(
			`{"qemu":{"major":7,"minor":2,"micro":22},"target":"x86_64","type":"pc-q35-7.2","accelerator":"kvm","cpus":[{"model":"host","taken":true}]}`), Attributes: map[string]string{capture.AttributeGuest: "web"}})
	if err != nil {
		t.Fatal(err)
	}
	i.Close()
}

// family makes a repository with a base, increments that fork, and an unrelated base.
func family(t *testing.T) *shell {
	s := newShell(t)
	s.write("web-1", "", 0, 0, 40)
	s.write("web-2", "web-1", 1, 0, 4)
	s.write("web-3", "web-2", 2, 8, 4)
	s.write("web-4", "web-3", 3, 8, 2)
	s.write("web-3b", "web-2", 4, 100, 10)
	s.write("db-1", "", 5, 0, 20)
	return s
}

// file returns the path of a file of an image whose name has the ending.
func (s *shell) file(name, ending string) string {
	s.t.Helper()
	found, err := filepath.Glob(filepath.Join(s.repo, "images", name, "*"+ending))
	if err != nil || len(found) == 0 {
		s.t.Fatalf("image %s has no file *%s: %v", name, ending, err)
	}
	return found[0]
}

// ownPages returns the path of the data file that was written for an image; the other ones are shared with its ancestors.
func (s *shell) ownPages(name string) string {
	s.t.Helper()
	for _, f := range runJSON[showJSON](s, 0, "show", name).Files {
		if f.Own {
			return s.file(name, f.ID+".pages")
		}
	}
	s.t.Fatalf("image %s has no pages of its own", name)
	return ""
}

// flip changes a byte of a file of an image; from the end where offset is negative.
func (s *shell) flip(path string, offset int) {
	s.t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	if offset < 0 {
		offset += len(content)
	}
	content[offset] ^= 0x40
	if err := os.WriteFile(path, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
}
