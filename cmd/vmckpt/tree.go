package main

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
)

// node is an image with the increments that were made on it.
type node struct {
	image.Summary
	damage   error          // found when the image was opened; its manifest is sound
	report   capture.Result // zero where the image has none, or one that this program does not understand
	parent   *node          // nil for a base, and where the parent is not in the repository
	children []*node
}

// kind says what an image is.
func (n *node) kind() string {
	switch {
	case n.Err != nil:
		return "unreadable"
	case n.Manifest.Parent != nil:
		return "increment"
	}
	return "base"
}

// forest puts images under their parents, the oldest first; those that cannot be read come last. A parent is known by its
// digest: another image may have got its name since.
func forest(summaries []image.Summary) (roots []*node) {
	byDigest := make(map[image.Digest]*node, len(summaries))
	nodes := make([]*node, len(summaries))
	for i, s := range summaries {
		n := &node{Summary: s}
		nodes[i] = n
		if s.Err != nil {
			continue
		}
		byDigest[s.Digest] = n
		if json.Unmarshal(s.Manifest.Report, &n.report) != nil {
			n.report = capture.Result{}
		}
	}
	for _, n := range nodes {
		if n.Err == nil && n.Manifest.Parent != nil {
			n.parent = byDigest[n.Manifest.Parent.Digest]
		}
		if n.parent == nil {
			roots = append(roots, n)
		} else {
			n.parent.children = append(n.parent.children, n)
		}
	}
	order := func(a, b *node) int {
		if (a.Err != nil) != (b.Err != nil) {
			if a.Err != nil {
				return 1
			}
			return -1
		}
		return cmp.Or(a.Manifest.Created.Compare(b.Manifest.Created), strings.Compare(a.Name, b.Name))
	}
	slices.SortFunc(roots, order)
	for _, n := range nodes {
		slices.SortFunc(n.children, order)
	}
	return roots
}

// problem is what keeps the image from being used, or nil.
func (n *node) problem() error {
	if n.Err != nil {
		return n.Err
	}
	return n.damage
}

// line is a node with the branches before its name.
type line struct {
	*node
	branches string
}

// draw returns the lines of a tree from the top. Branches begin where they fork, and beneath the base; a chain goes straight
// down, so that a hundred increments do not wander off to the right.
func draw(roots []*node) []line {
	var lines []line
	var walk func(n *node, own, below string)
	walk = func(n *node, own, below string) {
		lines = append(lines, line{n, own})
		if n.parent != nil && len(n.children) == 1 {
			walk(n.children[0], below, below)
			return
		}
		for i, c := range n.children {
			if i < len(n.children)-1 {
				walk(c, below+"├─ ", below+"│  ")
			} else {
				walk(c, below+"└─ ", below+"   ")
			}
		}
	}
	for _, r := range roots {
		walk(r, "", "")
	}
	return lines
}
