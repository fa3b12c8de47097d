package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/capture"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) error {
	repeat := flag.Int("repeat", 3, "how often each fault is tried at each step")
	minutes := flag.Int("minutes", 120, "the longest that it may take")
	only := flag.String("run", "", "faults to try, a `regexp` of tests; all where it is left out")
	flag.Parse()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(*minutes)*time.Minute)
	defer cancel()

	args := []string{"test", "-json", "-count=1", "-timeout=0", "./test/faults"}
	if *only != "" {
		args = append(args, "-run", *only)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "-args", fmt.Sprintf("-repeat=%d", *repeat))...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stderr = os.Stderr
	lines, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := newReport()
	begin := time.Now()
	readErr := r.read(lines, func(n int) {
		fmt.Fprintf(os.Stderr, "\r%d faults tried, %d survived, %v", n, r.survived, time.Since(begin).Round(time.Second))
	})
	fmt.Fprintln(os.Stderr)
	runErr := cmd.Wait()
	if err := errors.Join(readErr, r.write(out)); err != nil {
		return err
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("ended before all faults were tried: %w", context.Cause(ctx))
	case runErr != nil:
		return fmt.Errorf("%d of %d faults were not survived: %w", r.tried-r.survived, r.tried, runErr)
	case r.tried == 0:
		return errors.New("no fault was tried")
	}
	return nil
}

// count is what came of one kind of fault at one step.
type count struct{ tried, survived int }

// report counts faults by kind and step.
type report struct {
	steps           map[string]int // how a test's name has them; their order
	counts          map[string]map[string]*count
	tried, survived int
	failed          map[string][]string // output of the tests that failed
	output          map[string][]string
}

// anyStep is where faults are counted that belong to no step.
const anyStep = "any time"

func newReport() *report {
	r := &report{steps: map[string]int{}, counts: map[string]map[string]*count{}, failed: map[string][]string{}, output: map[string][]string{}}
	for i, s := range capture.Steps {
		r.steps[strings.ReplaceAll(string(s), " ", "_")] = i
	}
	return r
}

// read reads the events of go test -json.
func (r *report) read(in io.Reader, progress func(tried int)) error {
	scanner := bufio.NewScanner(in)
	scanner.Buffer(nil, 16<<20)
	parents := map[string]bool{} // tests with others in them
	for scanner.Scan() {
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(scanner.Bytes(), &e); err != nil {
			return fmt.Errorf("a line of go test: %w", err)
		}
		switch e.Action {
		case "run":
			for i, c := range e.Test {
				if c == '/' {
					parents[e.Test[:i]] = true
				}
			}
		case "output":
			r.output[e.Test] = append(r.output[e.Test], e.Output)
		case "pass", "fail":
			if e.Test != "" && !parents[e.Test] {
				r.add(e.Test, e.Action == "pass")
				progress(r.tried)
			}
			if e.Action == "fail" && !parents[e.Test] {
				r.failed[e.Test] = r.output[e.Test]
			}
			delete(r.output, e.Test)
		}
	}
	return scanner.Err()
}

// add counts a fault. Its test is named TestKind/…/step/…, with a number behind it where it came before.
func (r *report) add(test string, survived bool) {
	parts := strings.Split(test, "/")
	step := anyStep
	var kind []string
	for i, part := range parts {
		part, _, _ = strings.Cut(part, "#")
		if _, ok := r.steps[part]; ok && i > 0 {
			step = part
			continue
		}
		kind = append(kind, part)
	}
	name := strings.TrimPrefix(strings.Join(kind, "/"), "Test")
	if r.counts[name] == nil {
		r.counts[name] = map[string]*count{}
	}
	c := r.counts[name][step]
	if c == nil {
		c = &count{}
		r.counts[name][step] = c
	}
	c.tried++
	r.tried++
	if survived {
		c.survived++
		r.survived++
	}
}

// write writes the table, and what failed.
func (r *report) write(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FAULT\tSTEP\tTRIED\tSURVIVED")
	kinds := make([]string, 0, len(r.counts))
	for kind := range r.counts {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	for _, kind := range kinds {
		steps := make([]string, 0, len(r.counts[kind]))
		for step := range r.counts[kind] {
			steps = append(steps, step)
		}
		slices.SortFunc(steps, func(a, b string) int { return r.steps[a] - r.steps[b] })
		for _, step := range steps {
			c := r.counts[kind][step]
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\n", kind, strings.ReplaceAll(step, "_", " "), c.tried, c.survived)
		}
	}
	fmt.Fprintf(w, "all\t\t%d\t%d\n", r.tried, r.survived)
	if err := w.Flush(); err != nil {
		return err
	}
	for test, output := range r.failed {
		if _, err := fmt.Fprintf(out, "\nnot survived: %s\n%s", test, strings.Join(output, "")); err != nil {
			return err
		}
	}
	return nil
}
