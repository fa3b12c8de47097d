package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// unit is what values are counted in.
type unit string

const (
	milliseconds unit = "ms"
	seconds      unit = "s"
	megabytes    unit = "MB" // 10^6 bytes
	mebibytes    unit = "MiB"
	megaRate     unit = "MB/s"
	gigaRate     unit = "GB/s"
	percent      unit = "%"
	count        unit = ""
)

// cell is one figure, measured in one or more runs.
type cell struct {
	Unit   unit      `json:"unit,omitempty"`
	Values []float64 `json:"values"`
	Goal   *goal     `json:"goal,omitempty"`
}

// goal is what the median of a figure has to keep.
type goal struct {
	AtMost  float64 `json:"atMost,omitempty"`
	AtLeast float64 `json:"atLeast,omitempty"`
}

func (g goal) held(median float64) bool {
	return (g.AtMost == 0 || median <= g.AtMost) && median >= g.AtLeast
}

func atMost(v float64) *goal  { return &goal{AtMost: v} }
func atLeast(v float64) *goal { return &goal{AtLeast: v} }

func (c *cell) add(v float64) { c.Values = append(c.Values, v) }

func (c *cell) median() float64 {
	if len(c.Values) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(c.Values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// MarshalJSON adds what the tables show.
func (c cell) MarshalJSON() ([]byte, error) {
	type plain cell
	out := struct {
		plain
		Median float64 `json:"median"`
		Held   *bool   `json:"held,omitempty"`
	}{plain: plain(c), Median: c.median()}
	if c.Goal != nil && len(c.Values) > 0 {
		held := c.Goal.held(c.median())
		out.Held = &held
	}
	return json.Marshal(out)
}

// text is the median with its unit, and the least and the most where there are several values.
func (c *cell) text() string {
	if len(c.Values) == 0 {
		return "–"
	}
	s := c.number(c.median())
	if c.Unit != count {
		s += " " + string(c.Unit)
	}
	if len(c.Values) > 1 {
		s += fmt.Sprintf(" (%s–%s)", c.number(slices.Min(c.Values)), c.number(slices.Max(c.Values)))
	}
	return s
}

// number has three digits that mean something.
func (c *cell) number(v float64) string {
	switch {
	case v >= 100 || v == float64(int64(v)):
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

func (c *cell) goalText() string {
	switch {
	case c.Goal == nil:
		return ""
	case c.Goal.AtMost != 0:
		return fmt.Sprintf("≤ %s %s", c.number(c.Goal.AtMost), c.Unit)
	}
	return fmt.Sprintf("≥ %s %s", c.number(c.Goal.AtLeast), c.Unit)
}

func (c *cell) verdict() string {
	switch {
	case c.Goal == nil || len(c.Values) == 0:
		return ""
	case c.Goal.held(c.median()):
		return "yes"
	}
	return "**no**"
}

// table is a section of the report. With no Columns it is a list of figures with their goals: each line has one cell.
type table struct {
	Title   string   `json:"title"`
	Text    string   `json:"text,omitempty"`
	Columns []string `json:"columns,omitempty"` // the first is the lines' own
	Lines   []line   `json:"lines"`
}

type line struct {
	What  string  `json:"what"`
	Cells []*cell `json:"cells"`
}

// figure adds a line of one cell to a list.
func (t *table) figure(what string, u unit, g *goal) *cell {
	c := &cell{Unit: u, Goal: g}
	t.Lines = append(t.Lines, line{what, []*cell{c}})
	return c
}

// row adds a line with a cell for each unit.
func (t *table) row(what string, units ...unit) []*cell {
	l := line{What: what}
	for _, u := range units {
		l.Cells = append(l.Cells, &cell{Unit: u})
	}
	t.Lines = append(t.Lines, l)
	return l.Cells
}

func (t *table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n", t.Title)
	if t.Text != "" {
		fmt.Fprintf(&b, "%s\n\n", t.Text)
	}
	columns := t.Columns
	goals := false
	for _, l := range t.Lines {
		goals = goals || l.Cells[0].Goal != nil
	}
	if columns == nil {
		columns = []string{"", "median (least–most)"}
		if goals {
			columns = append(columns, "goal", "kept")
		}
	}
	rows := [][]string{columns, nil}
	for i := range columns {
		rule := "---"
		if i > 0 {
			rule = "--:"
		}
		rows[1] = append(rows[1], rule)
	}
	for _, l := range t.Lines {
		row := []string{l.What}
		for _, c := range l.Cells {
			row = append(row, c.text())
		}
		if t.Columns == nil && goals {
			row = append(row, l.Cells[0].goalText(), l.Cells[0].verdict())
		}
		rows = append(rows, row)
	}
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
	}
	return b.String()
}
