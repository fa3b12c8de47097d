package jobs

import (
	"context"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// CaptureRequest asks for a checkpoint. Fields left out have the defaults of [capture.Options].
type CaptureRequest struct {
	VM         VM         `json:"vm"`
	Repository Repository `json:"repository"`

	Name          string            `json:"name"`
	Mode          capture.Mode      `json:"mode,omitempty"`
	Instant       capture.When      `json:"instant,omitempty"`
	Parent        string            `json:"parent,omitempty"`
	Compression   image.Compression `json:"compression"`
	VerifyParent  bool              `json:"verifyParent,omitempty"`
	OtherKeys     bool              `json:"otherKeys,omitempty"`
	Witness       bool              `json:"witness,omitempty"`
	RecordDir     string            `json:"recordDir,omitempty"`
	ResidueBudget time.Duration     `json:"residueBudget,omitempty"` // ns, as the next three
	HoldBound     time.Duration     `json:"holdBound,omitempty"`
	PauseBound    time.Duration     `json:"pauseBound,omitempty"`
	WriteBound    time.Duration     `json:"writeBound,omitempty"`
	Attributes    map[string]string `json:"attributes,omitempty"`
}

// Capture takes a checkpoint in a worker.
func Capture(ctx context.Context, r CaptureRequest, h Handlers[capture.Progress]) (*capture.Result, error) {
	return do[capture.Result](ctx, nameCapture, r, h)
}

func runCapture(ctx context.Context, r CaptureRequest, progress func(any)) (*capture.Result, error) {
	repository, err := r.Repository.Open()
	if err != nil {
		return nil, err
	}
	defer repository.Close()
	process, monitor, err := r.VM.open(ctx, recordDir(r.RecordDir))
	if err != nil {
		return nil, err
	}
	defer monitor.Close()
	target := restore.Target{Process: process, Monitor: monitor}
	return capture.Run(ctx, capture.Target{Process: process, Monitor: monitor}, repository, capture.Options{
		Name:          r.Name,
		Mode:          r.Mode,
		Instant:       r.Instant,
		Parent:        r.Parent,
		Compression:   r.Compression,
		RecordDir:     r.RecordDir,
		ResidueBudget: r.ResidueBudget,
		HoldBound:     r.HoldBound,
		PauseBound:    r.PauseBound,
		WriteBound:    r.WriteBound,
		Attributes:    r.Attributes,
		VerifyParent:  r.VerifyParent,
		OtherKeys:     r.OtherKeys,
		Witness:       r.Witness,
		// What a restore has half written is nobody's memory.
		Admit:    func() error { return restore.Admit(ctx, target, recordDir(r.RecordDir)) },
		Progress: func(p capture.Progress) { progress(p) },
	})
}
