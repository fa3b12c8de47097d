package truth

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
)

// Bench is a machine under test with a repository, and an oracle that looks on.
type Bench struct {
	Machine    *machine.Machine
	Target     capture.Target
	Repository *image.Repository
	Dir        string // of the repository
	RecordDir  string // session records
	Witness    bool   // captures keep KVM's dirty log
	Oracle     *Oracle
	Names      []string // of the images made, in order

	T testing.TB // the test that fails where something here does; a subtest puts itself there

	n int
}

// keys are those of all repositories here.
var keys = image.Keys{Secret: [32]byte{1, 2, 3}}

// NewBench starts a machine, which ends with the test.
func NewBench(t testing.TB, o machine.Options) *Bench {
	t.Helper()
	return NewBenchOf(t, machine.Start(t, o))
}

// NewBenchOf puts a machine that was started under test.
func NewBenchOf(t testing.TB, m *machine.Machine) *Bench {
	t.Helper()
	process, err := qemu.Find(t.Context(), qemu.Selector{PID: m.PID})
	if err != nil {
		t.Fatal(err)
	}
	b := &Bench{Machine: m, Target: capture.Target{Process: process}, RecordDir: t.TempDir(), Oracle: NewOracle(m.PID), T: t}
	b.UseRepository(t.TempDir())
	b.Connect()
	t.Cleanup(b.Disconnect)
	return b
}

// UseRepository makes a repository in an empty directory, for all images from now on.
func (b *Bench) UseRepository(dir string) {
	b.T.Helper()
	if err := image.InitRepository(dir); err != nil {
		b.T.Fatal(err)
	}
	repo, err := image.OpenRepository(dir, keys)
	if err != nil {
		b.T.Fatal(err)
	}
	b.T.Cleanup(func() { repo.Close() })
	b.Repository, b.Dir, b.Names = repo, dir, nil
}

// Connect connects to the machine's monitor, which takes one client at a time where it is a socket of QEMU's own.
func (b *Bench) Connect() {
	b.T.Helper()
	ctx, cancel := context.WithTimeout(b.T.Context(), 10*time.Second)
	defer cancel()
	monitor, err := b.Machine.Dial(ctx)
	if err != nil {
		b.T.Fatal(err)
	}
	b.Target.Monitor = monitor
}

// Disconnect leaves the monitor to somebody else.
func (b *Bench) Disconnect() { b.Target.Monitor.Close() }

// Options are those of the next capture: the oracle looks at everything in its hold.
func (b *Bench) Options() capture.Options {
	b.n++
	return capture.Options{
		Name: fmt.Sprintf("i%03d", b.n), RecordDir: b.RecordDir, Compression: image.S2, Witness: b.Witness,
		HoldBound:  10 * time.Second, // reading everything takes its time
		WriteBound: 5 * time.Second,  // whatever else this machine is busy with
		Hooks:      capture.Hooks{Held: b.Oracle.Look},
	}
}

// Capture takes a checkpoint and returns its image.
func (b *Bench) Capture(ctx context.Context, o capture.Options) (*capture.Result, *image.Image) {
	b.T.Helper()
	result, err := capture.Run(ctx, b.Target, b.Repository, o)
	if err != nil {
		b.T.Fatal(err)
	}
	b.Names = append(b.Names, o.Name)
	img, err := b.Repository.Open(ctx, o.Name)
	if err != nil {
		b.T.Fatal(err)
	}
	b.T.Cleanup(func() { img.Close() })
	return result, img
}

// Judge compares an image with the truth of the last hold.
func (b *Bench) Judge(ctx context.Context, result *capture.Result, img *image.Image) {
	b.T.Helper()
	wrong, err := b.Oracle.Compare(ctx, img)
	if err != nil {
		b.T.Fatal(err)
	}
	if len(wrong) > 0 {
		b.T.Errorf("image %s: %d pages are wrong, first: %v\n%s", result.Image, len(wrong), wrong[0], show(result))
	}
}

func show(v any) string {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(text)
}
