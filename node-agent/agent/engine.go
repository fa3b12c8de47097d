package agent

import (
	"context"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// Engine is what the agent has done in worker processes. Tests of the queue put another one in its place.
type Engine interface {
	Capture(ctx context.Context, r jobs.CaptureRequest, progress func(capture.Progress)) (*capture.Result, error)
	Restore(ctx context.Context, r jobs.RestoreRequest, progress func(restore.Progress)) (*restore.Result, error)
	Image(ctx context.Context, r jobs.ImageRequest, progress func(jobs.VerifyProgress)) (*jobs.ImageResult, error)
	Delete(ctx context.Context, r jobs.DeleteRequest) error
}

// Workers is the Engine: package jobs.
type Workers struct{}

// Capture is [jobs.Capture].
func (Workers) Capture(ctx context.Context, r jobs.CaptureRequest, progress func(capture.Progress)) (*capture.Result, error) {
	return jobs.Capture(ctx, r, jobs.Handlers[capture.Progress]{Progress: progress})
}

// Restore is [jobs.Restore].
func (Workers) Restore(ctx context.Context, r jobs.RestoreRequest, progress func(restore.Progress)) (*restore.Result, error) {
	return jobs.Restore(ctx, r, jobs.Handlers[restore.Progress]{Progress: progress})
}

// Image is [jobs.Image].
func (Workers) Image(ctx context.Context, r jobs.ImageRequest, progress func(jobs.VerifyProgress)) (*jobs.ImageResult, error) {
	return jobs.Image(ctx, r, jobs.Handlers[jobs.VerifyProgress]{Progress: progress})
}

// Delete is [jobs.Delete].
func (Workers) Delete(ctx context.Context, r jobs.DeleteRequest) error { return jobs.Delete(ctx, r) }
