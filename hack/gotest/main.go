package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// event is a line of go test -json (go doc cmd/test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

// result is what a test came to.
type result struct {
	pkg, test string
	output    []string
}

// summary collects the events of a run.
type summary struct {
	out     io.Writer
	running map[[2]string]*result // by package and test; the test "" is the package itself
	failed  []*result
	skipped []*result
	passed  int
}

func main() {
	code, err := run(os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	os.Exit(code)
}

func run(args []string, out io.Writer) (int, error) {
	start := time.Now()
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	lines, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	s := &summary{out: out, running: map[[2]string]*result{}}
	if err := s.read(lines); err != nil {
		return 0, errors.Join(err, cmd.Wait())
	}
	err = cmd.Wait()
	s.report(time.Since(start))
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (s *summary) read(lines io.Reader) error {
	in := bufio.NewReader(lines)
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) != nil {
				fmt.Fprint(s.out, line) // not an event: what a build said
			} else {
				s.add(e)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read go test's output: %w", err)
		}
	}
}

func (s *summary) add(e event) {
	key := [2]string{e.Package, e.Test}
	r := s.running[key]
	if r == nil {
		r = &result{pkg: e.Package, test: e.Test}
		s.running[key] = r
	}
	switch e.Action {
	case "output":
		r.output = append(r.output, e.Output)
		if e.Test == "" && isPackageLine(e.Output) {
			fmt.Fprint(s.out, e.Output)
		}
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "pass", "skip", "fail":
		delete(s.running, key)
		switch {
		case e.Action == "fail":
			s.failed = append(s.failed, r)
			s.show(r)
		case e.Test == "":
		case e.Action == "skip":
			s.skipped = append(s.skipped, r)
		default:
			s.passed++
		}
	}
}

// isPackageLine tells the line that go test ends a package with. A package without tests is not worth a line.
func isPackageLine(line string) bool {
	return strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "FAIL\t")
}

// show prints what a failed test, or a package that failed as a whole, said.
func (s *summary) show(r *result) {
	for _, line := range r.output {
		if !strings.HasPrefix(line, "=== ") && !(r.test == "" && isPackageLine(line)) {
			fmt.Fprint(s.out, line)
		}
	}
	if r.test != "" {
		return
	}
	// A test that neither passed nor failed was running when the package's process died.
	for key, other := range s.running {
		if key[0] == r.pkg && key[1] != "" {
			fmt.Fprintf(s.out, "--- still running: %s\n", key[1])
			s.show(other)
		}
	}
}

func (s *summary) report(took time.Duration) {
	if len(s.skipped) > 0 {
		fmt.Fprintf(s.out, "\nskipped:\n")
		for _, r := range s.skipped {
			fmt.Fprintf(s.out, "  %s %s: %s\n", r.pkg, r.test, reason(r.output))
		}
	}
	failures := 0
	for _, r := range s.failed {
		if r.test == "" {
			continue
		}
		if failures++; failures == 1 {
			fmt.Fprintf(s.out, "\nfailed:\n")
		}
		fmt.Fprintf(s.out, "  %s %s\n", r.pkg, r.test)
	}
	fmt.Fprintf(s.out, "\n%d passed, %d skipped, %d failed in %v\n", s.passed, len(s.skipped), failures, took.Round(time.Second))
}

// reason is what a skipped test said last, without the place in the source.
func reason(output []string) string {
	var said string
	for _, line := range output {
		text := strings.TrimSpace(line)
		if text == "" || strings.HasPrefix(text, "=== ") || strings.HasPrefix(text, "--- ") {
			continue
		}
		said = text
		if place, rest, found := strings.Cut(text, ": "); found && strings.Contains(place, ".go:") {
			said = rest
		}
	}
	if said == "" {
		return "no reason given"
	}
	return said
}
