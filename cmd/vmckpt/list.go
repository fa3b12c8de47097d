package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
)

// listJSON is the answer of list.
type listJSON struct {
	Repository string      `json:"repository"`
	Images     []imageJSON `json:"images"` // parents before their children
}

// imageJSON is an image in lists.
type imageJSON struct {
	Name          string             `json:"name"`
	Kind          string             `json:"kind"` // base, increment, unreadable
	Digest        *image.Digest      `json:"digest,omitempty"`
	Parent        string             `json:"parent,omitempty"`
	ParentPresent bool               `json:"parentPresent,omitempty"`
	Created       *time.Time         `json:"created,omitempty"`
	MemoryBytes   uint64             `json:"memoryBytes,omitempty"`
	OwnBytes      int64              `json:"ownBytes,omitempty"`
	TotalBytes    int64              `json:"totalBytes,omitempty"`
	Pages         *image.PageCounts  `json:"pages,omitempty"`
	Source        string             `json:"source,omitempty"`
	Downtime      time.Duration      `json:"downtime,omitempty"` // ns
	Duration      time.Duration      `json:"duration,omitempty"` // ns
	Compression   *image.Compression `json:"compression,omitempty"`
	Encrypted     bool               `json:"encrypted,omitempty"`
	Attributes    map[string]string  `json:"attributes,omitempty"`
	Error         *failureJSON       `json:"error,omitempty"`
}

func (n *node) json() imageJSON {
	j := imageJSON{Name: n.Name, Kind: n.kind()}
	if err := n.problem(); err != nil {
		j.Error = describe(err)
	}
	if n.Err != nil {
		return j
	}
	m := &n.Manifest
	if m.Parent != nil {
		j.Parent, j.ParentPresent = m.Parent.Name, n.parent != nil
	}
	j.Digest, j.Created, j.MemoryBytes = &n.Digest, &m.Created, m.MemoryBytes()
	j.OwnBytes, j.TotalBytes, j.Pages = m.OwnBytes(), m.FileBytes(), &m.Pages
	j.Source, j.Downtime, j.Duration = n.report.Source, n.report.Downtime, n.report.Duration
	j.Compression, j.Encrypted, j.Attributes = &m.Compression, m.Encrypted(), m.Attributes
	return j
}

func (p *program) listCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the images of a repository, each beneath the one it was made on",
		Long: `List shows every image of a repository, increments beneath what they were made on. Branches show where two increments
share a parent; beneath the base, a chain of increments goes straight down.

WRITTEN counts the pages that the image added to the repository, SIZE is the room that its index and those pages take,
PAUSE how long the guest stood still for it, in all. Pages that later images share stay when the image is deleted.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return p.list(c.Context()) },
	}
	p.repositoryFlags(c)
	return c
}

func (p *program) list(ctx context.Context) error {
	repository, err := p.open()
	if err != nil {
		return err
	}
	defer repository.Close()
	summaries, err := repository.Images(ctx)
	if err != nil {
		return err
	}
	lines := draw(forest(summaries))
	for _, l := range lines {
		if l.Err == nil {
			l.damage = look(ctx, repository, l.Name)
		}
	}
	answer := listJSON{Repository: p.repository, Images: []imageJSON{}}
	for _, l := range lines {
		answer.Images = append(answer.Images, l.json())
	}
	p.answer(answer, func() { p.printList(lines) })
	return nil
}

func (p *program) printList(lines []line) {
	if len(lines) == 0 {
		p.printf("no images in %s\n", p.repository)
		return
	}
	rows := [][]string{{"IMAGE", "KIND", "CREATED", "MEMORY", "WRITTEN", "SIZE", "PAUSE", ""}}
	var bad int
	var own int64
	for _, l := range lines {
		if l.problem() != nil {
			bad++
		}
		if l.Err != nil {
			rows = append(rows, []string{l.branches + l.Name, l.kind(), "-", "-", "-", "-", "-", problem(l.Err)})
			continue
		}
		m := &l.Manifest
		own += m.OwnBytes()
		pause := "-"
		if l.report.Downtime > 0 {
			pause = durationText(l.report.Downtime)
		}
		note := ""
		switch {
		case l.damage != nil:
			note = problem(l.damage)
		case m.Parent != nil && l.parent == nil:
			note = missingParent(m.Parent.Name, lines)
		}
		rows = append(rows, []string{l.branches + l.Name, l.kind(), timeText(m.Created), sizeText(m.MemoryBytes()), countText(m.Pages.Written),
			sizeText(m.OwnBytes()), pause, note})
	}
	p.table(rows)
	whose := "their"
	if len(lines) == 1 {
		whose = "its"
	}
	p.printf("\n%s, %s of %s own\n", plural(len(lines), "image"), sizeText(own), whose)
	if bad > 0 {
		p.printf("%s cannot be restored\n", plural(bad, "image"))
	}
}

// missingParent says why no image has the digest that an increment has of its parent. Where something unreadable has the parent's name, it will
// be the parent: nobody can know, and nobody is to believe that it was deleted.
func missingParent(name string, lines []line) string {
	for _, l := range lines {
		switch {
		case l.Name != name:
		case l.Err != nil:
			return fmt.Sprintf("its parent %s cannot be read", name)
		default:
			return fmt.Sprintf("its parent %s is not here, another has its name", name)
		}
	}
	return fmt.Sprintf("its parent %s is not here", name)
}

// look opens an image, which shows missing and truncated files without reading them whole.
func look(ctx context.Context, repository *image.Repository, name string) error {
	i, err := repository.Open(ctx, name)
	if errors.Is(err, image.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	return i.Close()
}

// problem says in a few words what is wrong with an image.
func problem(err error) string {
	var damage *image.DamageError
	switch {
	case errors.As(err, &damage) && damage.Offset >= 0:
		return fmt.Sprintf("DAMAGED: %s at byte %d: %s", damage.File, damage.Offset, damage.What)
	case errors.As(err, &damage):
		return fmt.Sprintf("DAMAGED: %s: %s", damage.File, damage.What)
	case errors.Is(err, image.ErrWrongKey):
		return "WRONG KEY: it was written under another one"
	}
	return "UNREADABLE: " + err.Error()
}
