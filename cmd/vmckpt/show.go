package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// showJSON is the answer of show.
type showJSON struct {
	Repository string `json:"repository"`
	imageJSON
	Children []string          `json:"children"`
	Blocks   []image.BlockInfo `json:"blocks"`
	Files    []fileJSON        `json:"files"`
	Report   json.RawMessage   `json:"report,omitempty"`  // the result of its capture
	Machine  json.RawMessage   `json:"machine,omitempty"` // what a restore needs
}

// fileJSON is a data file of an image: pages, and their hashes.
type fileJSON struct {
	ID          string `json:"id"`              // of the image that it was first written for
	Image       string `json:"image,omitempty"` // its name, where it is in the repository
	Own         bool   `json:"own"`             // this image is the one
	Bytes       int64  `json:"bytes"`
	PagesInFile uint64 `json:"pagesInFile"`
	PagesUsed   uint64 `json:"pagesUsed"` // by this image
}

func (p *program) showCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "show IMAGE",
		Short: "Show all that is known of an image",
		Long: `Show tells what an image holds, what it was made on and what was made on it, what its capture cost, and which machine it
needs to be restored into. The answer in JSON has the whole description of that machine.`,
		Args: exactly("IMAGE"),
		RunE: func(c *cobra.Command, args []string) error { return p.show(c.Context(), args[0]) },
	}
	p.repositoryFlags(c)
	complete(c, false, p.imageNames)
	return c
}

func (p *program) show(ctx context.Context, name string) error {
	if err := image.CheckName(name); err != nil {
		return &usageError{err}
	}
	repository, err := p.open()
	if err != nil {
		return err
	}
	defer repository.Close()
	i, err := repository.Open(ctx, name)
	if err != nil {
		return err
	}
	defer i.Close()
	summaries, err := repository.Images(ctx)
	if err != nil {
		return err
	}
	var shown *node
	byID := map[string]string{}
	for _, l := range draw(forest(summaries)) {
		if l.Name == name {
			shown = l.node
		}
		if l.Err == nil {
			byID[l.Manifest.ID.String()] = l.Name
		}
	}
	if shown == nil || shown.Err != nil {
		return fmt.Errorf("image %s changed while it was looked at", name)
	}
	m := &shown.Manifest
	answer := showJSON{
		Repository: p.repository, imageJSON: shown.json(), Children: []string{}, Blocks: m.Blocks, Files: []fileJSON{},
		Report: m.Report, Machine: m.Machine,
	}
	for _, child := range shown.children {
		answer.Children = append(answer.Children, child.Name)
	}
	for _, f := range m.Data {
		answer.Files = append(answer.Files, fileJSON{
			ID: f.ID.String(), Image: byID[f.ID.String()], Own: f.ID == m.ID, Bytes: f.Pages.Bytes + f.Hashes.Bytes, PagesInFile: f.PagesInFile, PagesUsed: f.PagesUsed,
		})
	}
	p.answer(answer, func() { p.printShow(shown, &answer) })
	return nil
}

// machineText says which machine an image is of, in a line.
func machineText(recorded json.RawMessage) string {
	var m qemu.Machine
	if json.Unmarshal(recorded, &m) != nil || m.Type == "" {
		return ""
	}
	cpus := 0
	for _, cpu := range m.CPUs {
		if cpu.Taken {
			cpus++
		}
	}
	return fmt.Sprintf("%s (%s), %s, %s, QEMU %v", m.Type, m.Accelerator, plural(cpus, "CPU"), plural(len(m.Devices), "device"), m.QEMU)
}

// disksText says which disks of an image's machine the guest can write: they are not part of it. Empty where there are none.
func disksText(recorded json.RawMessage) string {
	var m qemu.Machine
	if json.Unmarshal(recorded, &m) != nil || len(m.WritableDisks) == 0 {
		return ""
	}
	verb := "is"
	if len(m.WritableDisks) > 1 {
		verb = "are"
	}
	return fmt.Sprintf("not part of the image: %s %s writable", strings.Join(m.WritableDisks, ", "), verb)
}

// disksWarnings is the same for scripts.
func disksWarnings(recorded json.RawMessage) []string {
	if text := disksText(recorded); text != "" {
		return []string{"disks are " + text}
	}
	return nil
}

// beforeSealing says of a capture's time, as its image has it, what is not in it: the report is part of what was sealed then.
func beforeSealing(took string) string {
	if took == "" {
		return ""
	}
	return took + ", and the sealing"
}

func (p *program) printShow(n *node, answer *showJSON) {
	m := &n.Manifest
	kind := kindText(m, &n.report)
	if m.Parent != nil && n.parent == nil {
		kind += "; that image is not here, and not needed"
	}
	instant := ""
	if !n.report.Instant.IsZero() {
		instant = timeText(n.report.Instant)
	}
	var attributes []string
	for _, k := range slices.Sorted(maps.Keys(m.Attributes)) {
		attributes = append(attributes, k+"="+m.Attributes[k])
	}
	p.fields(
		field{"image", m.Name},
		field{"kind", kind},
		field{"children", strings.Join(answer.Children, ", ")},
		field{"instant", instant},
		field{"created", timeText(m.Created)},
		field{"digest", n.Digest.String()},
		field{"id", m.ID.String()},
		field{"machine", machineText(m.Machine)},
		field{"disks", disksText(m.Machine)},
		field{"attributes", strings.Join(attributes, ", ")},
		field{"size", sizesText(m)},
		field{"stored", fmt.Sprintf("compression %s, encryption %s", m.Compression, m.Encryption)},
		field{"took", beforeSealing(tookText(&n.report))},
		field{"paused", pausedText(&n.report)},
		field{"guarded", guardedText(&n.report)},
		field{"witness", witnessText(&n.report)},
	)
	p.printPauses(&n.report)
	p.printPages(m)
	rows := [][]string{{"RAM BLOCK", "MEMORY", "PAGES"}}
	for _, b := range m.Blocks {
		rows = append(rows, []string{b.Name, sizeText(b.Bytes), countText(b.Bytes / pageset.PageBytes)})
	}
	p.printf("\n")
	p.table(rows)
	if len(answer.Files) == 0 {
		return
	}
	rows = [][]string{{"DATA FILE", "SIZE", "PAGES", "USED", "WRITTEN FOR"}}
	for _, f := range answer.Files {
		whose := f.Image
		switch {
		case f.Own:
			whose = "this image"
		case whose == "":
			whose = "an image that is not here"
		}
		rows = append(rows, []string{f.ID, sizeText(f.Bytes), countText(f.PagesInFile), countText(f.PagesUsed), whose})
	}
	p.printf("\n")
	p.table(rows)
}
