package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// nasty is a name that clears the screen, in three ways, goes to the line's start, and turns the text around.
const nasty = "a\x1b[2Jb\rc\u009b2Jd\x9b2Je\u202ef\u2028g\x07"

const seen = `a\u001b[2Jb\u000dc\u009b2Jd\x9b2Je\u202ef\u2028g\u0007`

func TestVisible(t *testing.T) {
	for text, want := range map[string]string{
		"":                   "",
		"pc.ram, 3 µs ≤ 4 %": "pc.ram, 3 µs ≤ 4 %",
		"two\nlines":         "two\nlines",
		"├─ web":             "├─ web",
		nasty:                seen,
		"a\tb\x7f\u200e":     `a\u0009b\u007f\u200e`,
		"cut \xe2\x82":       `cut \xe2\x82`,
		"replacement \ufffd": "replacement \ufffd",
	} {
		if got := visible(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	if got := oneLine("a\nerror: b"); got != `a\u000aerror: b` {
		t.Errorf("on one line: %q", got)
	}
}

// TestNothingSpeaksToTheTerminal prints what others have named, in every way that there is.
func TestNothingSpeaksToTheTerminal(t *testing.T) {
	var out, errs bytes.Buffer
	p := &program{stdout: &out, stderr: &errs, now: time.Now}
	p.printf("%s removed\n", "tmp/"+nasty+"\n")
	p.table([][]string{{"IMAGE", ""}, {nasty + "\n", "second"}})
	p.fields(field{"differs", qemu.Difference{What: nasty, Recorded: "a", Present: nasty}.String()})
	p.printRestore(&qemu.Process{PID: 1, Guest: nasty}, &restore.Result{Image: "i", Warnings: []string{nasty}}, "")
	p.complain(&fs.PathError{Op: "open", Path: nasty, Err: errors.New(nasty)})
	p.complain(errors.Join(errors.New("one"), errors.New(nasty)))
	p.warn("%v, %v", nasty, errors.New(nasty))
	(&plainMeter{w: &errs, now: time.Now}).at("verifying "+nasty, 0, 0)
	(&barMeter{w: &errs}).at("verifying "+nasty, 0, 0)
	for what, text := range map[string]string{"standard output": out.String(), "standard error": errs.String()} {
		// The bar's own are a carriage return and a command to clear the line.
		text = strings.NewReplacer("\r", "", "\x1b[K", "", "\x1b[2K", "").Replace(text)
		for _, r := range []string{"\x1b", "\u009b", "\x9b2", "\u202e", "\u2028", "\x07"} {
			if strings.Contains(text, r) {
				t.Errorf("%s has %q: %q", what, r, text)
			}
		}
		if strings.Count(text, seen) < 4 {
			t.Errorf("%s does not show what it leaves out: %q", what, text)
		}
	}

	out.Reset()
	p.encode(map[string]string{"name": nasty, "plain": "µ"})
	var back map[string]string
	if err := json.Unmarshal(out.Bytes(), &back); err != nil || back["name"] != strings.ToValidUTF8(nasty, "\ufffd") || back["plain"] != "µ" {
		t.Errorf("JSON %s: %q, %v", out.Bytes(), back, err)
	}
	for _, r := range out.String() {
		if acting(r) {
			t.Errorf("JSON has %q: %q", r, out.String())
		}
	}
}

// TestSweepShowsNames has the volume's owner put something beside the leftovers.
func TestSweepShowsNames(t *testing.T) {
	s := newShell(t)
	if err := os.Mkdir(filepath.Join(s.repo, "tmp", "\x1b[2J"), 0o700); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, _ := s.run("sweep", "--older-than", "0s", "--record-dir", t.TempDir())
	if strings.Contains(stdout+stderr, "\x1b") || !strings.Contains(stdout, `tmp/\u001b[2J left alone`) {
		t.Errorf("standard output %q, standard error %q", stdout, stderr)
	}
}

// TestAnswerNotWritten has standard output be a full volume.
func TestAnswerNotWritten(t *testing.T) {
	s := family(t)
	for _, args := range [][]string{{"list", "-o", "json"}, {"list"}, {"show", "web-1"}, {"verify", "web-1"}, {"--help"}, {"init", "--help"}} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		p := &program{stdout: full, stderr: &stderr, now: time.Now,
			getenv: func(name string) string {
				return map[string]string{repositoryVariable: s.repo, keyVariable: s.key}[name]
			}}
		if exit := p.run(t.Context(), args); exit != exitUnexpected || !strings.Contains(stderr.String(), "write the answer") {
			t.Errorf("vmckpt %v: exit code %d, standard error:\n%s", args, exit, stderr.String())
		}
		full.Close()
	}
}
