package truth

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// doomed asks for a capture in a worker that kills itself at a step.
type doomed struct {
	PID        int
	Socket     string
	Repository string
	Options    capture.Options
	At         capture.Step
}

const doomedJob = "doomed capture"

func doomedCapture(ctx context.Context, request json.RawMessage, _ func(any)) (any, error) {
	var r doomed
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, err
	}
	process, err := qemu.Find(ctx, qemu.Selector{PID: r.PID})
	if err != nil {
		return nil, err
	}
	monitor, err := qemu.DialUnix(ctx, r.Socket)
	if err != nil {
		return nil, err
	}
	repository, err := image.OpenRepository(r.Repository, keys)
	if err != nil {
		return nil, err
	}
	r.Options.Hooks.Step = func(at capture.Step) {
		if at == r.At {
			unix.Kill(os.Getpid(), unix.SIGKILL) //nolint:errcheck // the test shows
			select {}
		}
	}
	return capture.Run(ctx, capture.Target{Process: process, Monitor: monitor}, repository, r.Options)
}

// TestWorkerKilled: a worker that is killed once its session record is invalid, and before the record names the image that it sealed, takes
// with it what it knew of written pages, and the next checkpoint compares. Killed before or after that, the record is valid and tracking
// goes on. Whatever it was, the next image is true, and the one after it by tracking.
func TestWorkerKilled(t *testing.T) {
	if !kernelTracks(t) {
		t.Skip("Linux 6.7 is missing, for tracking by the page tables")
	}
	var accel machine.Accel = machine.KVM
	guest := machine.Writer{Percent: 60, Parameters: writer.Parameters{Random: true, PagesPerPass: 64, Spin: 100_000, DMAPagesPerPass: 1}}
	if err := machine.Available(t.Context(), machine.Options{Accel: accel, Guest: guest}); err != nil {
		t.Logf("%v; taken in its place: TCG", err)
		accel = machine.TCG
	}
	for _, memory := range []machine.Memory{machine.Private, machine.Memfd} {
		o := machine.Options{QEMU: machine.V10, Accel: accel, Memory: memory, MemoryBytes: 32 * machine.MiB, Guest: guest}
		t.Run(o.String(), func(t *testing.T) { killWorkers(t, o) })
	}
}

func killWorkers(t *testing.T, o machine.Options) {
	b := newBench(t, o)
	b.Witness = true // where there is KVM
	first, img := b.Capture(t.Context(), b.Options())
	b.Judge(t.Context(), first, img)
	for _, c := range []struct {
		at     capture.Step
		source string // of the next checkpoint
		sealed bool   // there is an image of the worker that was killed
	}{
		{capture.StepBegun, byPageTables, false},
		{capture.StepInvalidated, byContentHash, false},
		{capture.StepScanned, byContentHash, false},
		{capture.StepRearmed, byContentHash, false},
		{capture.StepReleased, byContentHash, false},
		{capture.StepSealing, byContentHash, false},
		{capture.StepSealed, byContentHash, true},
		{capture.StepRecorded, byPageTables, true},
	} {
		t.Run(string(c.at), func(t *testing.T) {
			b.T, b.t = t, t
			b.untilWritten(t.Context())
			killed := b.kill(c.at)
			if exists(t, b, killed) != c.sealed {
				t.Fatalf("there is an image %s: %t, and it should be %t", killed, !c.sealed, c.sealed)
			}
			parent := b.Names[len(b.Names)-1]
			if c.sealed {
				parent = killed
			}
			result, img := b.Capture(t.Context(), b.Options())
			b.Judge(t.Context(), result, img)
			if result.Source != c.source || result.Parent != parent {
				t.Errorf("after it an image is made on %q by %q (%s); want on %q by %q", result.Parent, result.Source, result.Why, parent, c.source)
			}
			if c.source == byContentHash && !strings.Contains(result.Why, "a capture was begun and its image not sealed") {
				t.Errorf("it says why it compared: %q", result.Why)
			}
			if result := b.instant(t.Context(), ordinary); result.Source != byPageTables {
				t.Errorf("the one after that is by %q (%s)", result.Source, result.Why)
			}
			b.running(t.Context())
		})
	}
}

// kill has a checkpoint taken by a worker that is killed at a step, and returns the name that its image was to have. The machine's
// monitor is the worker's meanwhile.
func (b *bench) kill(at capture.Step) string {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	o := b.Options()
	o.Hooks = capture.Hooks{}
	b.Disconnect()
	defer b.Connect()
	request := doomed{PID: b.Machine.PID, Socket: b.Machine.Socket, Repository: b.Dir, Options: o, At: at}
	err := supervise.Run(ctx, doomedJob, request, nil, supervise.Options{Grace: time.Second})
	var died *supervise.DiedError
	if !errors.As(err, &died) {
		b.t.Fatalf("the worker was to be killed at %q; it ended with %v", at, err)
	}
	return o.Name
}

func exists(t *testing.T, b *bench, name string) bool {
	t.Helper()
	images, err := b.Repository.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(images, func(s image.Summary) bool { return s.Name == name && s.Err == nil })
}
