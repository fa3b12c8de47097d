package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	env := map[string]string{repositoryVariable: dir, keyVariable: filepath.Join(dir, "key")}
	for _, c := range []struct {
		args string
		says string
		env  map[string]string
	}{
		{"frobnicate", "unknown command", env},
		{"list --frobnicate", "unknown flag", env},
		{"list web", "one argument too many", env},
		{"list --output yaml", "text or json", env},
		{"list --progress loud", "auto, bar, plain or none", env},
		{"list", "--repo", nil},
		{"list --repo /srv", "--key", nil},
		{"show", "IMAGE is missing", env},
		{"show ../etc", "image name", env},
		{"delete", "IMAGE is missing", env},
		{"verify ..", "image name", env},
		{"init", "lies in the repository", env},
		{"capture", "which machine", env},
		{"capture web --guest db", "two machines", env},
		{"capture web db", "one argument too many", env},
		{"capture web --mode half", "auto, full or incremental", env},
		{"capture web --mode full --parent web-1", "has no --parent", env},
		{"capture web --compression lzma", "unknown compression", env},
		{"capture web --budget 0s", "more than 0", env},
		{"capture web --name Web", "image name", env},
		{"capture web --attribute vm.uuid=x", "vm.uuid", env},
		{"capture web --attribute a=b,vm.name=x", "vm.name", env},
		{"capture web --monitor a --libvirt b", "two ways", env},
		{"capture web --libvirt qemu+ssh://elsewhere/system", "on this host", env},
		{"capture web --pid some", "--pid some: want a number", env},
		{"capture web --pid -3", "--pid -3: want", env},
		{"capture web --budget soon", "--budget soon: want a time", env},
		{"capture web --attribute x", "--attribute x: want KEY=VALUE", env},
		{"init --encrypt=perhaps", "--encrypt perhaps: want true or false", env},
		{"capture web --pause-bound 100ms", "--pause-bound 100ms is shorter than --hold-bound 200ms", env},
		{"restore", "IMAGE is missing", env},
		{"restore web-1", "which machine", env},
		{"release", "which machine", env},
		{"capture --uuid zz", "want a UUID", env},
		{"help foo", "no such command", env},
		{"completion tcsh", "bash, zsh", env},
	} {
		t.Run(c.args, func(t *testing.T) {
			stdout, stderr, exit := runWith(t, c.env, strings.Fields(c.args)...)
			if exit != exitUsage || stdout != "" {
				t.Errorf("exit code %d, want %d; standard output %q", exit, exitUsage, stdout)
			}
			if !strings.Contains(stderr, c.says) || !strings.Contains(stderr, "hint: ") || strings.Contains(stderr, "strconv") {
				t.Errorf("standard error:\n%swant %q and a hint", stderr, c.says)
			}
		})
	}
}

// TestUsageJSON has exactly one JSON value answer what was typed wrong, wherever --output stands.
func TestUsageJSON(t *testing.T) {
	s := &shell{t: t, repo: t.TempDir(), key: "/nowhere"}
	for _, args := range [][]string{{}, {"frobnicate"}, {"list", "--frobnicate"}, {"help", "foo"}, {"completion", "tcsh"}, {"list", "web"}} {
		got := runJSON[struct{ Error failureJSON }](s, exitUsage, args...).Error
		if got.Code != codeUsage || got.Hint == "" {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func TestHelpIsNoFailure(t *testing.T) {
	for _, args := range [][]string{{}, {"help"}, {"--help"}, {"capture", "--help"}, {"help", "restore"}, {"completion"}} {
		stdout, stderr, exit := runWith(t, nil, args...)
		if exit != 0 || stderr != "" || !strings.Contains(stdout, "Usage:") {
			t.Errorf("vmckpt %s: exit code %d, standard error %q", strings.Join(args, " "), exit, stderr)
		}
	}
}

func TestInit(t *testing.T) {
	dir := t.TempDir()
	s := &shell{t: t, repo: filepath.Join(dir, "one"), key: filepath.Join(dir, "key")}
	got := runJSON[initJSON](s, 0, "init", "--encrypt")
	want := initJSON{Repository: s.repo, KeyFile: s.key, KeyCreated: true, Encrypted: true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("first (-want +got):\n%s", diff)
	}
	if info, err := os.Stat(s.key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info, err)
	}
	failed := runJSON[struct{ Error failureJSON }](s, exitUsage, "init")
	if failed.Error.Code != jobs.CodeExists || !strings.Contains(failed.Error.Hint, "another directory") {
		t.Errorf("a second time: %+v", failed.Error)
	}
	s.repo = filepath.Join(dir, "two")
	want = initJSON{Repository: s.repo, KeyFile: s.key, KeyCreated: false, Encrypted: true}
	if diff := cmp.Diff(want, runJSON[initJSON](s, 0, "init")); diff != "" {
		t.Errorf("another with the same key (-want +got):\n%s", diff)
	}
	s.repo = filepath.Join(dir, "three")
	if err := os.Chmod(s.key, 0o644); err != nil {
		t.Fatal(err)
	}
	failed = runJSON[struct{ Error failureJSON }](s, exitUsage, "init")
	if failed.Error.Code != jobs.CodeKey {
		t.Errorf("with a key that others can read: %+v", failed.Error)
	}
	if _, err := os.Stat(s.repo); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a repository was made all the same: %v", err)
	}
}

// TestInitRefused refuses directories that cannot become repositories, says why, and leaves no key behind.
func TestInitRefused(t *testing.T) {
	check := func(s *shell, exit int, code jobs.Code, message, hint string) {
		t.Helper()
		got := runJSON[struct{ Error failureJSON }](s, exit, "init").Error
		if got.Code != code || !strings.Contains(got.Message, message) || !strings.Contains(got.Hint, hint) {
			t.Errorf("%+v", got)
		}
		if _, err := os.Stat(s.key); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a key file was left: %v", err)
		}
	}
	s := &shell{t: t, repo: t.TempDir(), key: filepath.Join(t.TempDir(), "key")}
	file := filepath.Join(s.repo, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(s, exitUsage, jobs.CodeExists, `"file"`, "empty")
	s.repo = file
	check(s, exitNotFound, jobs.CodeNotFound, file+" is not a directory", "--repo")

	t.Run("full volume", func(t *testing.T) {
		volume := t.TempDir()
		if err := unix.Mount("none", volume, "tmpfs", 0, "size=4k"); err != nil {
			t.Skipf("not available here: mounting a small volume: %v", err)
		}
		t.Cleanup(func() { unix.Unmount(volume, unix.MNT_DETACH) }) //nolint:errcheck // the directory cannot be removed else, and that is told
		if err := os.WriteFile(filepath.Join(volume, "full"), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		s := &shell{t: t, repo: filepath.Join(volume, "repository"), key: filepath.Join(t.TempDir(), "key")}
		check(s, exitNoSpace, jobs.CodeNoSpace, "full", "make room")
		s.repo, s.key = filepath.Join(t.TempDir(), "repository"), filepath.Join(volume, "key")
		check(s, exitNoSpace, jobs.CodeNoSpace, s.key, "make room")
	})
}

// TestNotARepository names a file as repository, and has delete take a stranger's directory for an image.
func TestNotARepository(t *testing.T) {
	s := family(t)
	stranger := filepath.Join(s.repo, "images", "stranger")
	if err := os.Mkdir(stranger, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stranger, "letter"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := runJSON[deleteJSON](s, exitRefused, "delete", "stranger").Images[0].Error
	if got.Code != jobs.CodeRefused || !strings.Contains(got.Hint, "nothing was removed") {
		t.Errorf("delete: %+v", got)
	}
	s.repo = filepath.Join(s.repo, "repository.json")
	if failed := runJSON[struct{ Error failureJSON }](s, exitNotFound, "list").Error; !strings.Contains(failed.Message, "is not a directory") ||
		!strings.Contains(failed.Hint, "--repo") {
		t.Errorf("list: %+v", failed)
	}
}

// TestInitInterrupted interrupts an init that waits for another one.
func TestInitInterrupted(t *testing.T) {
	s := &shell{t: t, repo: t.TempDir(), key: filepath.Join(t.TempDir(), "key")}
	other := filepath.Join(t.TempDir(), "other")
	s2 := &shell{t: t, repo: other, key: s.key}
	s2.ok("init")
	// The lock is the file that a repository has beside its own two directories and its description.
	locks, err := filepath.Glob(filepath.Join(other, "*lock*"))
	if err != nil || len(locks) != 1 {
		t.Fatalf("lock of a repository: %q, %v", locks, err)
	}
	lock, err := os.Create(filepath.Join(s.repo, filepath.Base(locks[0])))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	signals := make(chan os.Signal, 1)
	time.AfterFunc(200*time.Millisecond, func() { signals <- unix.SIGINT })
	var stdout, stderr bytes.Buffer
	p := &program{stdout: &stdout, stderr: &stderr, now: time.Now, signals: signals, getenv: func(string) string { return "" }}
	if exit := p.run(t.Context(), []string{"init", "--repo", s.repo, "--key", s.key}); exit != exitInterrupted || !strings.Contains(stderr.String(), s.repo) {
		t.Errorf("exit code %d, standard error:\n%s", exit, stderr.String())
	}
	lock.Close()
	// Here the program lives on, and with it what was waiting.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(s.repo, "repository.json")); err == nil {
			return
		}
	}
	t.Error("what waited for the lock did not get it")
}

// TestKeyFiles refuses what is no good as a key file, wherever it is used.
func TestKeyFiles(t *testing.T) {
	s := family(t)
	text, err := os.ReadFile(s.key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(path string, mode os.FileMode) string {
		if err := os.WriteFile(path, text, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Symlink(s.repo, filepath.Join(dir, "repository")))
	check(os.Symlink(s.key, filepath.Join(s.repo, "linked-out")))
	file(filepath.Join(s.repo, "inside"), 0o600)
	check(os.Symlink(filepath.Join(s.repo, "inside"), filepath.Join(dir, "linked-in")))
	check(unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	check(os.Symlink(s.key, filepath.Join(dir, "link")))
	keys := map[string]string{
		file(filepath.Join(dir, "readable"), 0o644): "chmod 600",
		filepath.Join(dir, "pipe"):                  "no regular file",
		dir:                                         "no regular file",
		filepath.Join(s.repo, "inside"):             "lies in the repository",
		filepath.Join(s.repo, "linked-out"):         "lies in the repository",
		filepath.Join(dir, "linked-in"):             "lies in the repository",
		filepath.Join(dir, "repository", "inside"):  "lies in the repository",
		filepath.Join(dir, "link"):                  "",
	}
	if os.Geteuid() == 0 {
		other := file(filepath.Join(dir, "other"), 0o600)
		check(os.Chown(other, 1234, 1234))
		keys[other] = "user 1234"
	}
	for key, says := range keys {
		s.key = key
		_, stderr, exit := s.run("list")
		if says == "" && exit != 0 || says != "" && (exit != exitUsage || !strings.Contains(stderr, says)) {
			t.Errorf("%s: exit code %d, standard error:\n%s", key, exit, stderr)
		}
	}
	// init does not make one there either.
	s.repo, s.key = filepath.Join(dir, "repository", "new"), filepath.Join(s.repo, "new", "key")
	if _, stderr, exit := s.run("init"); exit != exitUsage || !strings.Contains(stderr, "lies in the repository") {
		t.Errorf("init: exit code %d, standard error:\n%s", exit, stderr)
	}
}

// TestVerifyWhileImagesAreDeleted has another one delete an image that was to be verified, with all others.
func TestVerifyWhileImagesAreDeleted(t *testing.T) {
	verify := func(args ...string) (answer verifyJSON, exit int) {
		t.Helper()
		s := family(t)
		var stdout, stderr bytes.Buffer
		p := &program{stdout: &stdout, stderr: &stderr, getenv: func(name string) string {
			return map[string]string{repositoryVariable: s.repo, keyVariable: s.key}[name]
		}}
		p.now = func() time.Time { // asked for when an image is begun
			if repository := s.open(); repository != nil {
				repository.Delete(t.Context(), "web-3") //nolint:errcheck // the first time
			}
			return time.Now()
		}
		exit = p.run(t.Context(), append([]string{"verify", "-o", "json"}, args...))
		if err := json.Unmarshal(stdout.Bytes(), &answer); err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		return answer, exit
	}
	if got, exit := verify(); exit != 0 || !got.OK || len(got.Images) != 5 {
		t.Errorf("all: exit code %d, %+v", exit, got)
	}
	if got, exit := verify("web-1", "web-3"); exit != exitNotFound || got.OK || len(got.Images) != 2 {
		t.Errorf("one that was named: exit code %d, %+v", exit, got)
	}
}

// TestVerifyInterrupted interrupts a verify: what was found until then is said.
func TestVerifyInterrupted(t *testing.T) {
	s := family(t)
	for _, format := range []string{"text", "json"} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var stdout, stderr bytes.Buffer
		asked := 0
		p := &program{stdout: &stdout, stderr: &stderr,
			getenv: func(name string) string {
				return map[string]string{repositoryVariable: s.repo, keyVariable: s.key}[name]
			},
			now: func() time.Time { // asked for when an image is begun, and when it is done
				if asked++; asked == 5 {
					cancel()
				}
				return time.Now()
			}}
		if exit := p.run(ctx, []string{"verify", "--output", format}); exit != exitInterrupted ||
			!strings.HasPrefix(stderr.String(), "interrupted: ") || strings.Contains(stderr.String(), "context canceled") {
			t.Errorf("%s: exit code %d, standard error:\n%s", format, exit, stderr.String())
		}
		if format == "text" {
			if strings.Count(stdout.String(), " ok ") != 2 {
				t.Errorf("standard output:\n%s", stdout.String())
			}
			continue
		}
		var got verifyJSON
		if err := json.Unmarshal(stdout.Bytes(), &got); err != nil || got.OK || len(got.Images) != 2 || got.Error == nil || got.Error.Code != jobs.CodeInterrupted {
			t.Errorf("%v, %s", err, stdout.String())
		}
	}
}

// TestNotThere asks for what does not exist: repository, key, image.
func TestNotThere(t *testing.T) {
	s := family(t)
	for _, c := range []struct {
		name string
		s    shell
		args []string
		hint string
	}{
		{"image to show", *s, []string{"show", "web-9"}, "`vmckpt list`"},
		{"image to verify", *s, []string{"verify", "web-9"}, "`vmckpt list`"},
		{"image to delete", *s, []string{"delete", "web-9"}, "`vmckpt list`"},
		{"repository", shell{t, t.TempDir(), s.key}, []string{"list"}, "--repo"},
		{"directory", shell{t, filepath.Join(t.TempDir(), "nowhere"), s.key}, []string{"list"}, "--repo"},
		{"key", shell{t, s.repo, filepath.Join(t.TempDir(), "nowhere")}, []string{"list"}, "--key"},
		{"machine", *s, []string{"capture", "no-such-machine"}, "name a QEMU"},
		{"machine to release", *s, []string{"release", "no-such-machine"}, "name a QEMU"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.s.t = t
			if _, stderr, exit := c.s.run(c.args...); exit != exitNotFound || !strings.Contains(stderr, "hint: "+c.hint) && !strings.Contains(stderr, c.hint+" or ") {
				t.Errorf("exit code %d, want %d; standard error:\n%s", exit, exitNotFound, stderr)
			}
		})
	}
}

// shape is what a tree looks like in JSON.
type shape struct {
	Name, Kind, Parent string
	ParentPresent      bool
}

func shapes(l listJSON) (all []shape) {
	for _, i := range l.Images {
		all = append(all, shape{i.Name, i.Kind, i.Parent, i.ParentPresent})
	}
	return all
}

func TestListJSON(t *testing.T) {
	s := family(t)
	want := []shape{
		{"web-1", "base", "", false},
		{"web-2", "increment", "web-1", true},
		{"web-3", "increment", "web-2", true},
		{"web-4", "increment", "web-3", true},
		{"web-3b", "increment", "web-2", true},
		{"db-1", "base", "", false},
	}
	got := runJSON[listJSON](s, 0, "list")
	if diff := cmp.Diff(want, shapes(got)); diff != "" {
		t.Errorf("images (-want +got):\n%s", diff)
	}
	first := got.Images[0]
	if first.MemoryBytes != 1<<20+128<<10 || first.OwnBytes == 0 || first.TotalBytes != first.OwnBytes || first.Pages.Written != 40 ||
		!first.Created.Equal(zeroTime) || first.Downtime != 6700000 || first.Digest == nil {
		t.Errorf("web-1: %+v", first)
	}
	if second := got.Images[1]; second.Source != "page tables" || second.OwnBytes >= second.TotalBytes || second.Pages.Written != 4 {
		t.Errorf("web-2: %+v", second)
	}
}

// TestDelete takes an image out of the middle of a chain.
func TestDelete(t *testing.T) {
	s := family(t)
	if diff := cmp.Diff("web-2 deleted\n", s.ok("delete", "web-2")); diff != "" {
		t.Error(diff)
	}
	want := []shape{
		{"web-1", "base", "", false},
		{"web-3", "increment", "web-2", false},
		{"web-4", "increment", "web-3", true},
		{"web-3b", "increment", "web-2", false},
		{"db-1", "base", "", false},
	}
	if diff := cmp.Diff(want, shapes(runJSON[listJSON](s, 0, "list"))); diff != "" {
		t.Errorf("images (-want +got):\n%s", diff)
	}
	if got := runJSON[verifyJSON](s, 0, "verify"); !got.OK || len(got.Images) != 5 {
		t.Errorf("verify afterwards: %+v", got)
	}
	// A new image of the old name is not the parent.
	s.write("web-2", "", 6, 0, 3)
	list := s.ok("list")
	if !strings.Contains(list, "its parent web-2 is not here") {
		t.Errorf("list with another web-2:\n%s", list)
	}

	got := runJSON[deleteJSON](s, exitNotFound, "delete", "web-9", "db-1")
	if len(got.Images) != 2 || got.Images[0].Deleted || got.Images[0].Error.Code != jobs.CodeNotFound || !got.Images[1].Deleted {
		t.Errorf("one that is not there and one that is: %+v", got)
	}
}

func TestDamage(t *testing.T) {
	s := family(t)
	s.flip(s.file("web-4", "manifest.json"), 100)
	s.flip(s.ownPages("web-3b"), 40)
	if err := os.Truncate(s.file("db-1", "index"), 50); err != nil {
		t.Fatal(err)
	}

	t.Run("verify", func(t *testing.T) {
		got := runJSON[verifyJSON](s, exitDamaged, "verify")
		bad := map[string]string{}
		for _, v := range got.Images {
			if v.OK != (v.Error == nil) {
				t.Errorf("%+v", v)
			}
			if v.Error != nil {
				if v.Error.Code != jobs.CodeDamaged || v.Error.Damage.Image != v.Name {
					t.Errorf("%s: %+v", v.Name, v.Error)
				}
				file := v.Error.Damage.File
				bad[v.Name] = file[strings.LastIndex(file, ".")+1:]
			}
		}
		want := map[string]string{"web-4": "json", "web-3b": "pages", "db-1": "index"}
		if diff := cmp.Diff(want, bad); diff != "" || got.OK || len(got.Images) != 6 {
			t.Errorf("damaged (-want +got):\n%s", diff)
		}
	})
	t.Run("verify in words", func(t *testing.T) {
		stdout, stderr, exit := s.run("verify", "web-1", "db-1")
		if exit != exitDamaged || !strings.Contains(stdout, "web-1  ok") || !strings.Contains(stdout, "db-1   BAD") ||
			!strings.Contains(stderr, "hint: ") {
			t.Errorf("exit code %d, standard output:\n%sstandard error:\n%s", exit, stdout, stderr)
		}
	})
	t.Run("list", func(t *testing.T) {
		got := runJSON[listJSON](s, 0, "list")
		damaged := map[string]bool{}
		for _, i := range got.Images {
			if i.Error != nil {
				damaged[i.Name] = i.Error.Code == jobs.CodeDamaged
			}
		}
		// What lies in the pages alone, list does not look for.
		if diff := cmp.Diff(map[string]bool{"web-4": true, "db-1": true}, damaged); diff != "" {
			t.Errorf("damaged (-want +got):\n%s", diff)
		}
	})
	t.Run("show", func(t *testing.T) {
		if _, stderr, exit := s.run("show", "web-4"); exit != exitDamaged || !strings.Contains(stderr, "manifest.json") {
			t.Errorf("exit code %d, standard error:\n%s", exit, stderr)
		}
	})
	t.Run("verify, none sound", func(t *testing.T) {
		_, stderr, exit := s.run("verify", "web-4", "db-1")
		if exit != exitDamaged || !strings.Contains(stderr, "--mode full") || strings.Contains(stderr, "another image") {
			t.Errorf("exit code %d, standard error:\n%s", exit, stderr)
		}
	})
	t.Run("delete", func(t *testing.T) { s.ok("delete", "web-4", "db-1", "web-3b"); s.ok("verify") })
}

func TestWrongKey(t *testing.T) {
	s := family(t)
	other := newShell(t)
	s.key = other.key
	for _, i := range runJSON[listJSON](s, 0, "list").Images {
		if i.Kind != "unreadable" || i.Error.Code != jobs.CodeWrongKey {
			t.Errorf("list: %+v", i)
		}
	}
	for _, args := range [][]string{{"show", "web-1"}, {"verify"}, {"verify", "web-1"}} {
		if _, stderr, exit := s.run(args...); exit != exitDamaged || !strings.Contains(stderr, "key") {
			t.Errorf("%v: exit code %d, standard error:\n%s", args, exit, stderr)
		}
	}
	got := runJSON[deleteJSON](s, exitDamaged, "delete", "web-1").Images[0]
	if got.Deleted || got.Error.Code != jobs.CodeWrongKey || !strings.Contains(got.Error.Hint, "--force") {
		t.Errorf("delete of another's image: %+v", got)
	}
	if left := runJSON[listJSON](s, 0, "list").Images; len(left) != 6 {
		t.Errorf("%d images are left, want 6", len(left))
	}
	s.ok("delete", "web-1", "--force")
	if left := runJSON[listJSON](s, 0, "list").Images; len(left) != 5 {
		t.Errorf("%d images are left, want 5", len(left))
	}
}

func TestSweep(t *testing.T) {
	s := family(t)
	left := filepath.Join(s.repo, "tmp", "0123456789abcdef0123456789abcdef")
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := runJSON[sweepJSON](s, 0, "sweep"); len(got.Removed) != 0 || got.Younger != 1 {
		t.Errorf("what is young was removed: %v", got.Removed)
	}
	if got := s.ok("sweep"); !strings.Contains(got, "nothing older than 1h; 1 younger, ") || !strings.Contains(got, "--older-than 0s") {
		t.Errorf("in words:\n%s", got)
	}
	if got := runJSON[sweepJSON](s, 0, "sweep", "--older-than", "0s"); len(got.Removed) != 1 || got.Younger != 0 {
		t.Errorf("removed: %v", got.Removed)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("leftover: %v", err)
	}
}
