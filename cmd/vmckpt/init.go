package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// initJSON is the answer of init.
type initJSON struct {
	Repository string `json:"repository"`
	KeyFile    string `json:"keyFile"`
	KeyCreated bool   `json:"keyCreated"` // false where the key file was there already
	Encrypted  bool   `json:"encrypted"`
}

func (p *program) initCommand() *cobra.Command {
	var encrypt bool
	c := &cobra.Command{
		Use:   "init",
		Short: "Make a repository, and a key file if there is none",
		Long: `Init makes a repository of a directory, which it creates if need be. The key file is created where there is none; one
that exists is used as it is, so that several repositories can share it.

Whoever has the key file can read the images and make some that are believed; without it none can be read at all. It
must not lie in the repository. Keep a copy of it.`,
		Example: `  vmckpt init --repo /srv/checkpoints --key /etc/vmckpt.key --encrypt`,
		Args:    exactly(),
		RunE:    func(c *cobra.Command, _ []string) error { return p.init(c.Context(), encrypt) },
	}
	p.repositoryFlags(c)
	c.Flags().BoolVar(&encrypt, "encrypt", false, "encrypt images: a new key file gets an encryption key as well")
	return c
}

// errRepositoryThere says that init was to make a repository of what is one.
var errRepositoryThere = fmt.Errorf("the repository %w", image.ErrExists)

func (p *program) init(ctx context.Context, encrypt bool) (err error) {
	r, err := p.repositoryRequest()
	if err != nil {
		return err
	}
	// A repository that is there already is told before a key is made for it.
	if _, err := os.Lstat(filepath.Join(r.Dir, "repository.json")); err == nil {
		return fmt.Errorf("make repository %s: %w", r.Dir, errRepositoryThere)
	}
	created := false
	keys, err := r.Keys()
	switch {
	case errors.Is(err, jobs.ErrKeyInside):
		return &usageError{err}
	case errors.Is(err, image.ErrNotFound):
		created = true
		if keys, err = image.NewKeyFile(r.KeyFile, encrypt); err != nil {
			return &jobs.KeyError{Err: err}
		}
		// A key without a repository is of no use, and would be taken for one that was there the next time.
		defer func() {
			if err != nil {
				err = errors.Join(err, os.Remove(r.KeyFile))
			}
		}()
	case err != nil:
		return err
	}
	if encrypt && keys.Encryption == nil {
		return &jobs.KeyError{Err: fmt.Errorf("key file %s has no encryption key", r.KeyFile)}
	}
	if err := makeRepository(ctx, r.Dir); err != nil {
		return err
	}
	answer := initJSON{Repository: r.Dir, KeyFile: r.KeyFile, KeyCreated: created, Encrypted: keys.Encryption != nil}
	p.answer(answer, func() {
		p.printf("repository  %s\n", r.Dir)
		if created {
			p.printf("key file    %s (new; keep a copy: without it no image can be read)\n", r.KeyFile)
		} else {
			p.printf("key file    %s (was there)\n", r.KeyFile)
		}
		if answer.Encrypted {
			p.printf("encryption  AES-256-GCM\n")
		} else {
			p.printf("encryption  none: whoever can read the volume can read the guest's memory (--encrypt)\n")
		}
	})
	return nil
}

// makeRepository makes the repository, or waits for another one that does to end, which an interruption need not wait for: nothing was begun
// then, or it is as if the program had been killed.
func makeRepository(ctx context.Context, dir string) error {
	made := make(chan error, 1)
	go func() { made <- image.InitRepository(dir) }()
	select {
	case err := <-made:
		return err
	case <-ctx.Done():
		return fmt.Errorf("make repository %s: %w", dir, context.Cause(ctx))
	}
}
