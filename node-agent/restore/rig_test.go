package restore

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// rig is a repository and a node's record directory.
type rig struct {
	t       testing.TB
	repoDir string
	repo    *image.Repository
	records string
}

var testKeys = image.Keys{Secret: [32]byte{1, 2, 3}}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, repoDir: t.TempDir(), records: t.TempDir()}
	if err := image.InitRepository(r.repoDir); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.repo, err = image.OpenRepository(r.repoDir, testKeys); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.repo.Close() })
	return r
}

// subject is a machine as the product sees it.
type subject struct {
	*machine.Machine
	process *qemu.Process
	monitor qemu.Monitor // the product's
}

func (r *rig) start(o machine.Options) *subject {
	r.t.Helper()
	m := machine.Start(r.t, o)
	process, err := qemu.Find(r.t.Context(), qemu.Selector{PID: m.PID})
	if err != nil {
		r.t.Fatal(err)
	}
	monitor, err := qemu.DialUnix(r.t.Context(), m.Socket)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { monitor.Close() })
	return &subject{m, process, monitor}
}

func (s *subject) target() Target { return Target{Process: s.process, Monitor: s.monitor} }

func (s *subject) dirtyProcess() dirty.Process {
	return dirty.Process{PID: s.process.PID, StartTime: s.process.StartTime}
}

func (r *rig) state(s *subject) qemu.RunState {
	r.t.Helper()
	state, err := qemu.Status(r.t.Context(), s.Monitor)
	if err != nil {
		r.t.Fatal(err)
	}
	return state
}

// capture takes an image.
func (r *rig) capture(s *subject, name string) *image.Image {
	r.t.Helper()
	_, err := capture.Run(r.t.Context(), capture.Target{Process: s.process, Monitor: s.monitor}, r.repo, capture.Options{
		Name: name, RecordDir: r.records, Compression: image.S2,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return r.open(name)
}

func (r *rig) open(name string) *image.Image {
	r.t.Helper()
	img, err := r.repo.Open(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { img.Close() })
	return img
}

func (r *rig) options() Options {
	return Options{RecordDir: r.records, FullCompare: true}
}

// restore restores, and has the machine's memory judged by an oracle of its own.
func (r *rig) restore(s *subject, img *image.Image, o Options) *Result {
	r.t.Helper()
	result, err := Run(r.t.Context(), s.target(), img, o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Log(show(result))
	if state := r.state(s); state == qemu.StateRunning {
		r.t.Fatalf("the restored machine is %s", state)
	}
	if err := Invalid(r.records, s.dirtyProcess()); err != nil {
		r.t.Error(err)
	}
	r.judge(s, img)
	return result
}

// judge compares the memory of a standing machine with an image.
func (r *rig) judge(s *subject, img *image.Image) {
	r.t.Helper()
	wrong := r.wrong(s, img)
	if len(wrong) > 0 {
		r.t.Errorf("%d pages are wrong, first: %v", len(wrong), wrong[0])
	}
}

func (r *rig) wrong(s *subject, img *image.Image) []truth.Wrong {
	r.t.Helper()
	ctx := r.t.Context()
	layout, err := qemu.ReadLayout(ctx, s.Monitor, s.process)
	if err != nil {
		r.t.Fatal(err)
	}
	oracle := truth.NewOracle(s.PID)
	if err := oracle.Look(ctx, layout); err != nil {
		r.t.Fatal(err)
	}
	wrong, err := oracle.Compare(ctx, img)
	if err != nil {
		r.t.Fatal(err)
	}
	return wrong
}

// goesOn continues the machine and sees its bare-metal guest go on, with all pages as it left them.
func (r *rig) goesOn(s *subject) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	before, begun, err := s.WriterStatus(ctx)
	if err != nil || !begun {
		r.t.Fatalf("restored memory has no account of the guest: %+v, %v", before, err)
	}
	if err := s.Continue(ctx); err != nil {
		r.t.Fatal(err)
	}
	after, err := s.WaitWriter(ctx, func(now writer.Status) bool { return now.Passes >= before.Passes+20 })
	if err != nil {
		r.t.Fatal(err)
	}
	if after.Errors != 0 {
		r.t.Errorf("the guest found %d pages that it had not left so, the last at %#x", after.Errors, after.ErrorGPA)
	}
}

// marked wants a machine that stands and is marked.
func (r *rig) marked(s *subject, err error) {
	r.t.Helper()
	var invalid *InvalidMemoryError
	if !errors.As(err, &invalid) {
		r.t.Errorf("the restore's error is %v, and no InvalidMemoryError", err)
	}
	if err := Invalid(r.records, s.dirtyProcess()); !errors.As(err, &invalid) {
		r.t.Errorf("the machine is not marked: %v", err)
	}
	if state := r.state(s); state == qemu.StateRunning {
		r.t.Errorf("a machine with half its memory is %s", state)
	}
}

func show(v any) string {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(text)
}
