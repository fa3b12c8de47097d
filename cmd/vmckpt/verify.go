package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// verifyJSON is the answer of verify.
type verifyJSON struct {
	Repository string             `json:"repository"`
	OK         bool               `json:"ok"` // all of them are
	Images     []verificationJSON `json:"images"`
	Error      *failureJSON       `json:"error,omitempty"` // an interruption: further images were not looked at
}

// verificationJSON is what was found of one image.
type verificationJSON struct {
	Name     string        `json:"name"`
	OK       bool          `json:"ok"`
	Bytes    int64         `json:"bytes,omitempty"`    // its files together
	Duration time.Duration `json:"duration,omitempty"` // ns
	Error    *failureJSON  `json:"error,omitempty"`
}

func (p *program) verifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify [IMAGE...]",
		Short: "Read images whole and check every byte; all images if none is named",
		Long: `Verify reads everything that an image consists of and checks it: the manifest's MAC, the index, every page and every
file's digest. It goes on after a damaged image and ends with exit code 5 if there was one.

A restore checks all that it reads as well, before the VM gets any of it. Verify tells you earlier.`,
		RunE: func(c *cobra.Command, args []string) error { return p.verify(c.Context(), args) },
	}
	p.repositoryFlags(c)
	complete(c, true, p.imageNames)
	return c
}

func (p *program) verify(ctx context.Context, names []string) error {
	for _, name := range names {
		if err := image.CheckName(name); err != nil {
			return &usageError{err}
		}
	}
	repository, err := p.open()
	if err != nil {
		return err
	}
	defer repository.Close()
	all := len(names) == 0
	if all {
		summaries, err := repository.Images(ctx)
		if err != nil {
			return err
		}
		for _, s := range summaries {
			names = append(names, s.Name)
		}
	}
	answer := verifyJSON{Repository: p.repository, OK: true, Images: []verificationJSON{}}
	var first error
	for n, name := range names {
		phase := "verifying " + name
		if len(names) > 1 {
			phase = fmt.Sprintf("[%d/%d] verifying %s", n+1, len(names), name)
		}
		v, err := p.verifyOne(ctx, repository, name, phase)
		if err != nil {
			if ctx.Err() != nil {
				return p.verifiedUntil(answer, err)
			}
			if all && errors.Is(err, image.ErrNotFound) {
				continue // deleted meanwhile: nobody asked for this one
			}
			answer.OK = false
			first = worse(first, err)
		}
		answer.Images = append(answer.Images, v)
	}
	p.answer(answer, func() { p.printVerify(answer) })
	if first != nil {
		return &reported{nothingSound(answer, first)}
	}
	return nil
}

// verifiedUntil answers with what was found before an interruption.
func (p *program) verifiedUntil(answer verifyJSON, err error) error {
	answer.OK, answer.Error = false, describe(err)
	p.answer(answer, func() {
		if len(answer.Images) > 0 {
			p.printVerify(answer)
		}
	})
	p.complain(err)
	return &reported{err}
}

// nothingSound gives the error of damage its hint where there is no other image to restore from.
func nothingSound(answer verifyJSON, err error) error {
	for _, v := range answer.Images {
		if v.OK || v.Error.Code != jobs.CodeDamaged {
			return err
		}
	}
	return &adviceError{err, "none of these can be restored: take a base with `vmckpt capture --mode full`, look after the volume, and delete what is damaged"}
}

// worse keeps the error that the exit code is to tell of: damage before all else.
func worse(a, b error) error {
	var damage *image.DamageError
	if a == nil || !errors.As(a, &damage) && errors.As(b, &damage) {
		return b
	}
	return a
}

func (p *program) verifyOne(ctx context.Context, repository *image.Repository, name, phase string) (verificationJSON, error) {
	v := verificationJSON{Name: name}
	began := p.now()
	meter := p.meter()
	defer meter.end()
	err := func() error {
		i, err := repository.Open(ctx, name)
		if err != nil {
			return err
		}
		defer i.Close()
		m := i.Manifest()
		v.Bytes = m.FileBytes()
		return i.Verify(ctx, func(done, total int64) { meter.at(phase, done, total) })
	}()
	v.OK, v.Duration = err == nil, p.now().Sub(began)
	if err != nil {
		v.Error = describe(err)
	}
	return v, err
}

func (p *program) printVerify(answer verifyJSON) {
	if len(answer.Images) == 0 {
		p.printf("no images in %s\n", p.repository)
		return
	}
	var rows [][]string
	bad := 0
	for _, v := range answer.Images {
		if v.OK {
			rows = append(rows, []string{v.Name, "ok", fmt.Sprintf("%s in %s", sizeText(v.Bytes), durationText(v.Duration))})
			continue
		}
		bad++
		rows = append(rows, []string{v.Name, "BAD", v.Error.Message})
	}
	p.table(rows)
	if bad > 0 {
		p.printf("\n%s of %d cannot be restored\n", plural(bad, "image"), len(answer.Images))
	}
}
