package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/machine"
)

// bench is one run of the program.
type bench struct {
	runs  int    // of what takes a second or more; what is shorter is repeated more often
	dir   string // on the volume that is measured; removed at the end
	stack stack
}

// suite is something that is measured by itself. It returns whatever it has when it fails.
type suite struct {
	name string
	run  func(context.Context, *bench) ([]table, error)
}

// suites are all of them, in order.
var suites = []suite{
	{"increment", increments},
	{"base", bases},
	{"memory", memory},
	{"restore", restores},
	{"guard", guarded},
	{"qemu", native},
	{"steps", steps},
}

func suiteNames() string {
	var names []string
	for _, s := range suites {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// choose returns the suites of a list of names separated by commas; an empty list means all.
func choose(list string) (chosen []suite, err error) {
	if list == "" {
		return suites, nil
	}
	wanted := map[string]bool{}
	for name := range strings.SplitSeq(list, ",") {
		wanted[strings.TrimSpace(name)] = true
	}
	for _, s := range suites {
		if wanted[s.name] {
			chosen = append(chosen, s)
			delete(wanted, s.name)
		}
	}
	for name := range wanted {
		return nil, fmt.Errorf("-only: there is no suite %q; there are %s", name, suiteNames())
	}
	return chosen, nil
}

func main() {
	guard.Main()
	inject.Main()
	supervise.Main(jobs.All(), func(err error) string { return string(jobs.CodeOf(err)) })

	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	runs := flag.Int("runs", 3, "runs of what takes long; what is short is run three times as often")
	parent := flag.String("dir", os.TempDir(), "a directory on the volume to measure on; 8 GiB are used for a while")
	jsonPath := flag.String("json", "", "write all figures to this file")
	only := flag.String("only", "", "suites to run, separated by commas: "+suiteNames()+" (default all)")
	flag.Parse()
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	b := &bench{runs: max(1, *runs)}
	if b.dir, err = os.MkdirTemp(*parent, "vmckpt-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.stack, err = describe(ctx, b.dir); err != nil {
		return err
	}
	fmt.Printf("%s\n", b.stack.markdown())
	if err := warm(); err != nil {
		return err
	}

	begin := time.Now()
	var tables []table
	var failed []error
	for _, s := range chosen {
		once := time.Now()
		got, err := s.run(ctx, b)
		for _, t := range got {
			fmt.Printf("\n%s", t.markdown())
		}
		tables = append(tables, got...)
		var missing *machine.Unavailable
		switch {
		case errors.As(err, &missing):
			fmt.Printf("\n%s: %v\n", s.name, missing)
		case err != nil:
			failed = append(failed, fmt.Errorf("%s: %w", s.name, err))
		}
		fmt.Fprintf(os.Stderr, "bench: %s took %v\n", s.name, time.Since(once).Round(100*time.Millisecond))
		if ctx.Err() != nil {
			return errors.Join(append(failed, ctx.Err())...)
		}
	}
	fmt.Printf("\nMeasured in %v.\n", time.Since(begin).Round(time.Second))
	if *jsonPath != "" {
		text, err := json.MarshalIndent(struct {
			Stack  stack   `json:"stack"`
			Tables []table `json:"tables"`
		}{b.stack, tables}, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(*jsonPath, append(text, '\n'), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}
