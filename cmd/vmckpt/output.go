package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
)

// outputFormat is the value of --output.
type outputFormat string

const (
	outputText outputFormat = "text"
	outputJSON outputFormat = "json"
)

func (f *outputFormat) String() string { return string(*f) }
func (f *outputFormat) Type() string   { return "format" }

func (f *outputFormat) Set(s string) error {
	switch v := outputFormat(s); v {
	case outputText, outputJSON:
		*f = v
		return nil
	}
	return fmt.Errorf("want text or json")
}

// answer gives the command's answer in the format that was asked for. text prints it for people.
func (p *program) answer(v any, text func()) {
	if p.output == outputJSON {
		p.encode(v)
		return
	}
	text()
}

func (p *program) encode(v any) {
	e := json.NewEncoder(visibleWriter{p.stdout}) // which gets each value in one piece
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	e.Encode(v) //nolint:errcheck // run looks whether the answer was written
}

// tell writes to people beside the answer.
func (p *program) tell(format string, args ...any) {
	fmt.Fprintf(p.stderr, format, visibleArgs(args)...)
}

// printf writes a part of the answer. Line ends are those of the format.
func (p *program) printf(format string, args ...any) {
	fmt.Fprintf(p.stdout, format, visibleArgs(args)...)
}

// table prints rows of cells, the first row being the heads; empty ones at the end of a row leave nothing behind.
func (p *program) table(rows [][]string) {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, cells := range rows {
		var texts []string
		for _, cell := range cells {
			texts = append(texts, oneLine(cell)) // before it is told how wide it is
		}
		fmt.Fprintln(t, strings.Join(texts, "\t"))
	}
	t.Flush() //nolint:errcheck // a strings.Builder takes everything
	for line := range strings.Lines(b.String()) {
		p.printf("%s\n", strings.TrimRight(line, " \n"))
	}
}

// field is a line of an answer.
type field struct{ name, value string }

// fields prints lines of a name and a value; those without a value are left out.
func (p *program) fields(list ...field) {
	var rows [][]string
	for _, f := range list {
		if f.value != "" {
			rows = append(rows, []string{f.name, f.value})
		}
	}
	p.table(rows)
}
