package main

import (
	"fmt"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progressStyle is the value of --progress.
type progressStyle string

const (
	progressAuto  progressStyle = "auto"
	progressBar   progressStyle = "bar"
	progressPlain progressStyle = "plain"
	progressNone  progressStyle = "none"
)

func (s *progressStyle) String() string { return string(*s) }
func (s *progressStyle) Type() string   { return "style" }

func (s *progressStyle) Set(v string) error {
	switch style := progressStyle(v); style {
	case progressAuto, progressBar, progressPlain, progressNone:
		*s = style
		return nil
	}
	return fmt.Errorf("want auto, bar, plain or none")
}

// meter shows how far a piece of work is. Its methods are called by one goroutine at a time.
type meter interface {
	// at says that the work is in a phase, and done bytes of total; total is 0 where there is no such number.
	at(phase string, done, total int64)

	// end takes away what should not stay on the terminal.
	end()
}

// meter returns the meter that was asked for. Progress goes to standard error; with JSON there is none unless it is asked for.
func (p *program) meter() meter {
	style := p.progress
	if style == progressAuto {
		style = progressNone
		if p.terminal && p.output == outputText {
			style = progressBar
		}
	}
	switch style {
	case progressBar:
		return &barMeter{w: p.stderr, columns: p.columns}
	case progressPlain:
		return &plainMeter{w: p.stderr, now: p.now}
	}
	return noMeter{}
}

type noMeter struct{}

func (noMeter) at(string, int64, int64) {}
func (noMeter) end()                    {}

// barMeter draws one bar, for the phase that the work is in.
type barMeter struct {
	w       io.Writer
	columns func() int // that the terminal has; nil or 0 where it is none
	bar     *progressbar.ProgressBar
	phase   string
	total   int64
}

// What a bar's line takes at most, in columns. A line that wraps is never taken away again.
const (
	barColumns     = 30 // the bar itself
	labelColumns   = 10 // the shortest label that says something
	numbersColumns = 49 // "100% ||", sizes, rate and times
	percentColumns = 10 // "100% ||" and the blanks behind it
	usualColumns   = 80 // of a terminal that does not say
)

// layout says how the columns of a terminal are shared out: label, bar, and whether there is room for numbers. The last column stays free:
// some terminals wrap when it is written.
func layout(columns int) (label, bar int, numbers bool) {
	if columns <= 0 {
		columns = usualColumns
	}
	rest := columns - 1 - percentColumns
	if room := columns - 1 - numbersColumns; room >= labelColumns+3 {
		rest, numbers = room, true
	}
	bar = min(barColumns, max(1, rest-2*labelColumns, rest/3))
	return max(1, rest-bar), bar, numbers
}

// cut shortens a label that has no room, in the middle: both its ends tell images apart.
func cut(label string, columns int) string {
	all := []rune(label)
	if len(all) <= columns {
		return label
	}
	if columns < 5 {
		return string(all[:columns])
	}
	head := (columns - 1) / 2
	return string(all[:head]) + "…" + string(all[len(all)-(columns-1-head):])
}

func (m *barMeter) at(phase string, done, total int64) {
	phase = oneLine(phase) // it may have a name in it
	if m.bar == nil || phase != m.phase || total != m.total {
		m.end()
		m.phase, m.total = phase, total
		m.bar = newBar(m.w, phase, total, m.columns)
	}
	if total != 0 {
		done = min(done, total)
	}
	m.bar.Set64(done) //nolint:errcheck // a terminal that is gone is no reason to stop
}

func newBar(w io.Writer, phase string, total int64, terminal func() int) *progressbar.ProgressBar {
	columns := 0
	if terminal != nil {
		columns = terminal()
	}
	label, bar, numbers := layout(columns)
	options := []progressbar.Option{
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetDescription(fmt.Sprintf("%-*s", min(label, labelColumns), cut(phase, label))),
		progressbar.OptionSetWidth(bar),
		progressbar.OptionThrottle(100 * time.Millisecond),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionSetElapsedTime(false),
		progressbar.OptionSetRenderBlankState(true),
	}
	if total == 0 {
		// A spinner that turns with the progress: by itself it would go on turning after its phase.
		return progressbar.NewOptions64(-1, append(options, progressbar.OptionSetSpinnerChangeInterval(0))...)
	}
	if !numbers {
		return progressbar.NewOptions64(total, append(options, progressbar.OptionSetPredictTime(false))...)
	}
	return progressbar.NewOptions64(total, append(options,
		progressbar.OptionShowBytes(true),
		progressbar.OptionShowTotalBytes(true),
		progressbar.OptionShowCount(),
		progressbar.OptionUseIECUnits(true),
	)...)
}

func (m *barMeter) end() {
	if m.bar != nil {
		m.bar.Clear() //nolint:errcheck // as above
		m.bar = nil
	}
}

// plainMeter writes a line for each phase, and a line every few seconds in a long one: for logs.
type plainMeter struct {
	w     io.Writer
	now   func() time.Time
	phase string
	wrote time.Time
}

// plainInterval is how long a phase goes on until there is another line about it.
const plainInterval = 5 * time.Second

func (m *plainMeter) at(phase string, done, total int64) {
	phase = oneLine(phase)
	now := m.now()
	if phase == m.phase && now.Sub(m.wrote) < plainInterval {
		return
	}
	m.phase, m.wrote = phase, now
	if total == 0 {
		fmt.Fprintf(m.w, "%s\n", phase)
		return
	}
	fmt.Fprintf(m.w, "%s: %s of %s (%d %%)\n", phase, sizeText(min(done, total)), sizeText(total), min(done, total)*100/total)
}

func (m *plainMeter) end() {}
