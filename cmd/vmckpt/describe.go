package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
)

// What capture and show say of an image, for people.

// kindText says what an image is and how that came about.
func kindText(m *image.Manifest, r *capture.Result) string {
	text := "base"
	if m.Parent != nil {
		text = "increment of " + m.Parent.Name
		if r.Source != "" {
			text += ", dirty pages by " + r.Source
		}
	}
	if r.Why != "" {
		text += " (" + strings.TrimPrefix(r.Why, "a base: ") + ")"
	}
	return text
}

// sizesText says what an image takes of the volume.
func sizesText(m *image.Manifest) string {
	text := fmt.Sprintf("%s for %s of memory", sizeText(m.OwnBytes()), sizeText(m.MemoryBytes()))
	if shared := m.FileBytes() - m.OwnBytes(); shared > 0 {
		text += fmt.Sprintf(", and %s shared with other images", sizeText(shared))
	}
	return text
}

// tookText says how long a capture took, and with what.
func tookText(r *capture.Result) string {
	if r.Duration == 0 {
		return ""
	}
	return durationText(r.Duration) + phasesText(r.Phases)
}

func phasesText(phases []capture.Phase) string {
	if len(phases) == 0 {
		return ""
	}
	var parts []string
	for _, p := range phases {
		parts = append(parts, p.Name+" "+durationText(p.Duration))
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

// pausedText says how long the guest stood still.
func pausedText(r *capture.Result) string {
	if len(r.Pauses) == 0 {
		return ""
	}
	text := durationText(r.Downtime) + " in " + plural(len(r.Pauses), "pause")
	if r.OwnerPaused {
		var held time.Duration
		for _, p := range r.Pauses {
			held += p.Total
		}
		text = fmt.Sprintf("by its owner, and left so; held for %s of it", durationText(held))
	}
	if r.Attempts > 1 {
		text += fmt.Sprintf("; the instant held at the %s attempt", ordinal(r.Attempts))
	}
	return text
}

// guardedText says what was copied after the instant; empty where nothing was.
func guardedText(r *capture.Result) string {
	g := r.Guard
	if g == nil {
		return ""
	}
	return fmt.Sprintf("%s copied after the instant, %s of them as the guest was about to write; its writes waited %s times",
		pagesText(g.Guarded), countText(g.Caught), countText(g.Faults))
}

// witnessText says what KVM's dirty log had to say; empty where it was not asked for.
func witnessText(r *capture.Result) string {
	w := r.Witness
	switch {
	case w == nil:
		return ""
	case !w.Compared:
		return "none: " + w.Why
	}
	text := fmt.Sprintf("KVM's dirty log agrees with the page tables; %s only there", pagesText(w.Unseen))
	switch {
	case w.Alarm():
		text = fmt.Sprintf("KVM's dirty log has %s that the page tables missed, first %s: report this", pagesText(w.Missed), w.First)
	case w.Missed > 0:
		text = fmt.Sprintf("KVM's dirty log has %s more than the page tables, written for guests of the guest", pagesText(w.Missed))
	}
	return text + fmt.Sprintf(" (read in %s, cleared in %s)", durationText(w.Read), durationText(w.Clear))
}

func pagesText(n uint64) string {
	if n == 1 {
		return "1 page"
	}
	return countText(n) + " pages"
}

func ordinal(n int) string {
	suffix := "th"
	if n%100 < 11 || n%100 > 13 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return fmt.Sprint(n, suffix)
}

// printPauses prints each pause with its parts.
func (p *program) printPauses(r *capture.Result) {
	if len(r.Pauses) == 0 {
		return
	}
	rows := [][]string{{"PAUSE", "TIME", "PARTS"}}
	for _, pause := range r.Pauses {
		name, total := pause.For, durationText(pause.Total)
		if pause.Lost {
			name += " (lost)"
		}
		if !pause.Exact {
			total = "≤ " + total // as seen from outside
		}
		var parts []string
		for _, part := range pause.Parts {
			parts = append(parts, part.Name+" "+durationText(part.Duration))
		}
		rows = append(rows, []string{name, total, strings.Join(parts, ", ")})
	}
	p.printf("\n")
	p.table(rows)
}

// printPages prints what an image's pages are and where they come from.
func (p *program) printPages(m *image.Manifest) {
	c := &m.Pages
	rows := [][]string{{"PAGES", fmt.Sprintf("%12s", "NUMBER"), fmt.Sprintf("%10s", "MEMORY")}}
	row := func(name string, pages uint64) {
		rows = append(rows, []string{name, fmt.Sprintf("%12s", countText(pages)), fmt.Sprintf("%10s", sizeText(pages*pageset.PageBytes))})
	}
	row("stored", c.Stored)
	row("uniform", c.Uniform)
	row("unpopulated", c.Unpopulated)
	if c.Evicted > 0 {
		row("evicted", c.Evicted)
	}
	row("all", c.Total)
	if m.Parent != nil {
		row("the parent's", c.Inherited)
		row("compared, the same", c.Unchanged)
	}
	row("written", c.Written)
	p.printf("\n")
	p.table(rows)
	if c.WrittenRaw > 0 {
		p.printf("\nwritten pages take %s on the volume (%s, %.1f %%)\n", sizeText(c.WrittenBytes), m.Compression,
			100*float64(c.WrittenBytes)/float64(c.WrittenRaw))
	}
}
