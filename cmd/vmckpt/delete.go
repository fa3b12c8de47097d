package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
)

// deleteJSON is the answer of delete.
type deleteJSON struct {
	Repository string         `json:"repository"`
	Images     []deletionJSON `json:"images"` // in the order of the arguments
}

// deletionJSON is what became of one of them.
type deletionJSON struct {
	Name    string       `json:"name"`
	Deleted bool         `json:"deleted"`
	Error   *failureJSON `json:"error,omitempty"`
}

func (p *program) deleteCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:     "delete IMAGE...",
		Aliases: []string{"rm"},
		Short:   "Delete images; increments made on them stay whole",
		Long: `Delete takes images out of the repository, damaged ones too. No other image is touched: increments made on a deleted
one can be restored as before, and what they share with it stays on the volume until the last of them is gone.

If tracking of a running VM counts from a deleted image, the next capture of that VM compares all memory with its newest
other image; where there is none, it makes a new base.

An image that was written under another key than the one given may be somebody else's: it is deleted with --force only.`,
		Args: atLeastOne("IMAGE"),
		RunE: func(c *cobra.Command, args []string) error { return p.delete(c.Context(), args, force) },
	}
	p.repositoryFlags(c)
	c.Flags().BoolVar(&force, "force", false, "delete images that were written under another key, too")
	complete(c, true, p.imageNames)
	return c
}

func (p *program) delete(ctx context.Context, names []string, force bool) error {
	repository, err := p.open()
	if err != nil {
		return err
	}
	defer repository.Close()
	answer := deleteJSON{Repository: p.repository, Images: []deletionJSON{}}
	var errs []error
	for _, name := range names {
		err := image.CheckName(name)
		if err != nil {
			err = &usageError{err}
		} else if err = ctx.Err(); err == nil {
			err = deleteOne(ctx, repository, name, force)
		}
		d := deletionJSON{Name: name, Deleted: err == nil}
		if err != nil {
			errs = append(errs, err)
			d.Error = describe(err)
		}
		answer.Images = append(answer.Images, d)
	}
	p.answer(answer, func() {
		for _, d := range answer.Images {
			if d.Deleted {
				p.printf("%s deleted\n", d.Name)
			}
		}
	})
	return p.several(errs)
}

// deleteOne deletes an image. Only one that is known to be under another key is kept; what cannot be opened for another reason is deleted.
func deleteOne(ctx context.Context, repository *image.Repository, name string, force bool) error {
	if err := look(ctx, repository, name); errors.Is(err, image.ErrWrongKey) && !force {
		return &adviceError{fmt.Errorf("delete image %s: %w", name, err), "name the key file that it was written with, or delete it all the same with --force"}
	}
	return repository.Delete(ctx, name)
}

// several tells of each error of a command that did one thing after the other, and returns the first for the exit code.
func (p *program) several(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	for _, err := range errs {
		p.complain(err)
	}
	return &reported{errs[0]}
}
