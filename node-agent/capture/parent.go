package capture

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
)

// createImage chooses what the image is made on, and begins it. A parent that turns out to be damaged means a base, said so, unless an
// increment was asked for.
func (c *capture) createImage(ctx context.Context) error {
	if c.o.Mode == Full {
		return c.create(ctx, nil)
	}
	parent, err := c.chooseParent(ctx)
	if err == nil {
		err = c.create(ctx, parent)
		parent.Close()
		if err == nil {
			return nil
		}
	}
	if !unfit(err) || c.o.Mode == Incremental || c.o.Parent != "" && errors.Is(err, image.ErrNotFound) {
		return err
	}
	if c.result.Why == "" {
		c.result.Why = err.Error()
	}
	c.result.Why = "a base: " + c.result.Why
	return c.create(ctx, nil)
}

// unfit says whether an error means that there is no parent to build on, rather than that nothing can be written at all.
func unfit(err error) bool {
	var parent *image.ParentError
	var damage *image.DamageError
	return errors.As(err, &parent) || errors.As(err, &damage) || errors.Is(err, ErrNoParent) ||
		errors.Is(err, image.ErrNotFound)
}

// chooseParent opens the image that an increment is to be made on: the one asked for, the one that tracking counts from, or the newest
// of this machine.
func (c *capture) chooseParent(ctx context.Context) (*image.Image, error) {
	if c.o.Parent != "" {
		return c.openParent(ctx, c.o.Parent)
	}
	if tracked, err := c.session.Image(); err == nil {
		img, err := c.openParent(ctx, tracked.Name)
		switch {
		case err == nil && img.Digest().String() == tracked.Digest:
			return img, nil
		case err == nil:
			img.Close()
			c.result.Why = fmt.Sprintf("tracking counts from another image that had the name %s, of another repository or deleted since", tracked.Name)
		case errors.Is(err, image.ErrNotFound):
			c.result.Why = fmt.Sprintf("tracking counts from image %s, which is not in this repository: it is in another one, or was deleted", tracked.Name)
		case !unfit(err) && !errors.Is(err, image.ErrWrongKey): // of those under another key there may be others below
			return nil, err
		default:
			c.result.Why = fmt.Sprintf("image %s, which tracking counts from, cannot be used: %v", tracked.Name, err)
		}
	}
	images, err := c.repo.Images(ctx)
	if err != nil {
		return nil, err
	}
	if err := wrongKey(images); err != nil && !c.o.OtherKeys {
		return nil, err
	}
	var newest, unreadable *image.Summary
	for i, s := range images {
		switch {
		case s.Err != nil:
			unreadable = &images[i]
		case s.Manifest.Attributes[AttributeUUID] != c.target.Process.UUID, s.Manifest.Attributes[AttributeGuest] != c.target.Process.Guest:
		case newest == nil || s.Manifest.Created.After(newest.Manifest.Created):
			newest = &images[i]
		}
	}
	switch {
	case newest != nil:
		return c.openParent(ctx, newest.Name)
	case c.result.Why != "":
		return nil, fmt.Errorf("%w: %s", ErrNoParent, c.result.Why)
	case unreadable != nil: // it may be of this machine; that cannot be known
		return nil, fmt.Errorf("%w: image %s cannot be read: %v", ErrNoParent, unreadable.Name, unreadable.Err)
	}
	return nil, ErrNoParent
}

// wrongKey refuses a repository all of whose images were written under another key: it is the key that is wrong, and not that there is nothing to
// build on. A base made under it would look like one of the repository's, and could be restored by nobody who has the right key.
func wrongKey(images []image.Summary) error {
	for _, s := range images {
		if !errors.Is(s.Err, image.ErrWrongKey) {
			return nil
		}
	}
	if len(images) == 0 {
		return nil
	}
	return fmt.Errorf("all %d images of the repository: %w", len(images), images[0].Err)
}

func (c *capture) openParent(ctx context.Context, name string) (*image.Image, error) {
	img, err := c.repo.Open(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("parent %s: %w", name, err)
	}
	if c.o.VerifyParent {
		if err := img.Verify(ctx, nil); err != nil {
			img.Close()
			return nil, fmt.Errorf("parent %s: %w", name, err)
		}
	}
	return img, nil
}

// create begins the image, and makes the session count from its parent.
func (c *capture) create(ctx context.Context, parent *image.Image) error {
	spec := image.Spec{
		Name: c.o.Name, Parent: parent, Compression: c.o.Compression,
		EstimateBytes: c.estimateBytes(ctx), ReserveBytes: reserveBytes, RewriteBytes: rewriteBytes,
	}
	for _, b := range c.layout {
		spec.Blocks = append(spec.Blocks, image.BlockInfo{Name: b.Name, Bytes: b.Bytes})
	}
	writer, err := c.repo.Create(ctx, spec)
	if err != nil {
		return err
	}
	if parent == nil {
		c.writer = writer
		c.result.Parent, c.result.Source = "", ""
		c.session.SinceNothing()
		if untracked := c.untracked(); untracked != "" {
			c.because(untracked)
		}
		return nil
	}
	manifest := parent.Manifest()
	source, why := "page tables", ""
	if err := c.session.Since(dirty.Image{Name: manifest.Name, Digest: parent.Digest().String()}); err != nil {
		// Everything is looked at, and the writer keeps what the parent has not.
		source, why = "content hash", err.Error()
		if unknown := (*dirty.UnknownError)(nil); errors.As(err, &unknown) {
			why = unknown.Reason
		}
	} else if c.parentAbsent, err = c.absentIn(parent); err != nil {
		return errors.Join(err, writer.Abort())
	}
	if c.result.Why == "" { // else the parent was chosen for a reason that says as much
		c.result.Why = why
	}
	if untracked := c.untracked(); untracked != "" {
		source = "content hash"
		c.because(untracked)
	}
	c.writer = writer
	c.result.Parent, c.result.Source = manifest.Name, source
	return nil
}

// untracked says what is copied in the pause since the page tables do not tell what is written to it; "" where there is no such memory. A
// base has it copied there as an increment has.
func (c *capture) untracked() string {
	for _, untracked := range c.session.Untracked() {
		if untracked != nil {
			return untracked.Error() + "; it is copied in the pause"
		}
	}
	return ""
}

// because adds to what the result says of how it came about.
func (c *capture) because(why string) {
	if c.result.Why != "" {
		why = c.result.Why + "; " + why
	}
	c.result.Why = why
}

const (
	// reserveBytes of the volume are left free, so that a repository that ran full can still be tidied.
	reserveBytes = 16 << 20

	// rewriteBytes of pages in old, little used files are stored again with each increment, so that the files go in time.
	rewriteBytes = 64 << 20

	// storedShare is what of the memory that is looked at is reckoned to reach the volume: less than most machines' need, so that nobody is
	// refused for want of space that would have sufficed. Writing watches the space as well.
	storedShare = 8
)

// estimateBytes reckons what the image will take: a share of what is populated where everything is looked at, of what is dirty else.
func (c *capture) estimateBytes(ctx context.Context) int64 {
	pages, err := c.session.Estimate(ctx)
	if err != nil {
		return 0 // whatever it is, it will show again where it counts
	}
	if pages <= c.o.budgetPages() {
		return int64(pages * pageset.PageBytes / storedShare) // so little that another walk of the page tables is not worth it
	}
	var populated uint64
	for i, memory := range c.session.Memory() {
		holes, err := memory.Unpopulated(ctx, c.pagemap)
		if err != nil {
			return 0
		}
		populated += c.blocks[i].Pages() - holes.Count()
	}
	return int64(min(pages, populated) * pageset.PageBytes / storedShare)
}

// absentIn collects the pages that an image has no content for.
func (c *capture) absentIn(parent *image.Image) (dirty.Sets, error) {
	absent := dirty.NewSets(c.blocks)
	for i := range c.blocks {
		for extent, err := range parent.Extents(i) {
			if err != nil {
				return nil, err
			}
			if extent.Kind == image.Unpopulated || extent.Kind == image.Evicted {
				absent[i].Add(pageset.Run{First: extent.Run.First, Count: extent.Run.Count})
			}
		}
	}
	return absent, nil
}
