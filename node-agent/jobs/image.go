package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
)

// ImageRequest asks what is known of an image. Volumes may hang, so this too is done by a worker.
type ImageRequest struct {
	Repository Repository `json:"repository"`
	Image      string     `json:"image"`

	// Verify has every byte of it checked.
	Verify bool `json:"verify,omitempty"`

	// Make makes the repository where there is none, and Sweep first removes what writers that died have left in it.
	Make  bool `json:"make,omitempty"`
	Sweep bool `json:"sweep,omitempty"`
}

// ImageResult is what an image says of itself.
type ImageResult struct {
	Name       string            `json:"name"`
	Digest     image.Digest      `json:"digest"`     // of its manifest
	Repository string            `json:"repository"` // the id of the one that it lies in
	Created    time.Time         `json:"created"`
	Parent     string            `json:"parent,omitempty"`
	Encrypted  bool              `json:"encrypted,omitempty"`
	Attributes map[string]string `json:"attributes,omitempty"`
	Pages      image.PageCounts  `json:"pages"`
	OwnBytes   int64             `json:"ownBytes"`

	// Report is how it was captured; nil where the image does not say.
	Report *capture.Result `json:"report,omitempty"`
}

// VerifyProgress is how far the check of an image has come.
type VerifyProgress struct {
	DoneBytes  int64 `json:"doneBytes"`
	TotalBytes int64 `json:"totalBytes"`
}

// Image returns what is known of an image, in a worker. One that is not there is an error of [CodeNotFound]; so is one whose
// repository is not, but on a volume, where that is [CodeNoRepository].
func Image(ctx context.Context, r ImageRequest, h Handlers[VerifyProgress]) (*ImageResult, error) {
	return do[ImageResult](ctx, nameImage, r, h)
}

func runImage(ctx context.Context, r ImageRequest, progress func(any)) (*ImageResult, error) {
	if r.Make {
		if err := r.Repository.make(); err != nil {
			return nil, err
		}
	}
	repository, err := r.Repository.Open()
	if err != nil {
		return nil, err
	}
	defer repository.Close()
	if r.Sweep {
		if _, err := repository.Sweep(ctx, 0); err != nil {
			return nil, err
		}
	}
	img, err := repository.Open(ctx, r.Image)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	if r.Verify {
		err := img.Verify(ctx, func(done, total int64) { progress(VerifyProgress{done, total}) })
		if err != nil {
			return nil, err
		}
	}
	m := img.Manifest()
	result := &ImageResult{
		Name: m.Name, Digest: img.Digest(), Repository: m.Repository.String(), Created: m.Created, Encrypted: m.Encrypted(),
		Attributes: m.Attributes, Pages: m.Pages, OwnBytes: m.OwnBytes(),
	}
	if m.Parent != nil {
		result.Parent = m.Parent.Name
	}
	report := new(capture.Result)
	if len(m.Report) != 0 && json.Unmarshal(m.Report, report) == nil {
		result.Report = report
	}
	return result, nil
}

// make makes the repository, if it is not there.
func (r Repository) make() error {
	create := func() error { return image.InitRepository(r.Dir) }
	if r.Volume != "" {
		create = func() error { return image.InitRepositoryOn(r.Volume, r.Dir) }
	}
	err := create()
	switch {
	case errors.Is(err, image.ErrExists):
		return nil
	case r.Volume != "" && errors.Is(err, fs.ErrNotExist): // the volume itself
		return &NoRepositoryError{r.Dir, r.Volume}
	}
	return err
}

// DeleteRequest asks for an image to be removed.
type DeleteRequest struct {
	Repository Repository `json:"repository"`
	Image      string     `json:"image"`
}

// Delete removes an image, in a worker. One that is not there is an error of [CodeNotFound].
func Delete(ctx context.Context, r DeleteRequest) error {
	_, err := do[struct{}](ctx, nameDelete, r, Handlers[struct{}]{})
	return err
}

func runDelete(ctx context.Context, r DeleteRequest, _ func(any)) (struct{}, error) {
	repository, err := r.Repository.Open()
	if err != nil {
		return struct{}{}, err
	}
	defer repository.Close()
	return struct{}{}, repository.Delete(ctx, r.Image)
}
