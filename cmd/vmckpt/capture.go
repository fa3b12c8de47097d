package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/image/pageset"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// captureJSON is the answer of capture: the result of package capture, and where and how large the image is.
type captureJSON struct {
	*capture.Result
	Repository  string `json:"repository"`
	Kind        string `json:"kind"` // base or increment
	VM          vmJSON `json:"vm"`
	MemoryBytes uint64 `json:"memoryBytes"`
	OwnBytes    int64  `json:"ownBytes"`
	TotalBytes  int64  `json:"totalBytes"`

	Warnings []string `json:"warnings,omitempty"`
}

// vmJSON names the machine that was worked on.
type vmJSON struct {
	PID   int    `json:"pid"`
	Guest string `json:"guest,omitempty"`
	UUID  string `json:"uuid,omitempty"`
}

func (p *program) captureCommand() *cobra.Command {
	var vm vmFlags
	r := jobs.CaptureRequest{Compression: image.Zstd}
	r.Mode, r.Instant = capture.Auto, capture.Late
	mode := wordFlag[capture.Mode]{&r.Mode, "mode", []capture.Mode{capture.Auto, capture.Full, capture.Incremental}}
	instant := wordFlag[capture.When]{&r.Instant, "instant", []capture.When{capture.Late, capture.Early}}
	c := &cobra.Command{
		Use:   "capture [VM]",
		Short: "Take a checkpoint of a running machine",
		Long: `Capture makes an image of a running machine's memory and device state at one instant. The guest goes on but for a pause
of milliseconds; if its owner has paused it, it stays paused.

Its instant is late by default: memory is copied first, with the guest running, and the image is of the moment when little was
left. With --instant early it is the moment of asking: memory is guarded, and copied afterwards, each page at the latest when
the guest is about to write to it.

The first image of a machine is a base with every page. Later ones are increments: with what changed since the parent by
the kernel's page tables where tracking is unbroken, or by comparing all memory with the parent's page hashes where it is
not. The answer says which it was and why.

Disks are not captured yet: keep them as they are at the instant by other means.`,
		Example: `  vmckpt capture web
  vmckpt capture --pid 4242 --name before-upgrade --mode full
  vmckpt capture web --libvirt qemu:///system --compression s2`,
		Args: between(0, "VM"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.VM, err = vm.vm(argument(args, 0), p.getenv); err != nil {
				return err
			}
			return p.capture(c.Context(), r)
		},
	}
	vm.selectorFlags(c)
	vm.monitorFlags(c)
	p.repositoryFlags(c)
	f := c.Flags()
	f.StringVar(&r.Name, "name", "", "name of the `IMAGE` (default: the machine's name and the time in UTC)")
	f.Var(&mode, "mode", "auto (an increment where it can be), full (a base) or incremental (an increment or an error)")
	f.Var(&instant, "instant", "late (copy first, so that the image is as new as can be) or early (the moment of asking; copy afterwards)")
	f.StringVar(&r.Parent, "parent", "", "`IMAGE` to make an increment on (default: the machine's last one)")
	f.Var(compressionFlag{&r.Compression}, "compression", "zstd, s2 (faster, larger) or none")
	f.BoolVar(&r.VerifyParent, "verify-parent", false, "check every byte of the parent first; one that is damaged means a base")
	f.BoolVar(&r.Witness, "witness", false, "keep KVM's dirty log, and compare it with the page tables: a write that they missed is found")
	f.StringToStringVar(&r.Attributes, "attribute", nil, "`KEY=VALUE` to keep with the image; may be given more than once")
	f.Lookup("attribute").DefValue = "" // none, and not an empty list
	f.DurationVar(&r.ResidueBudget, "budget", 5*time.Millisecond, "`TIME` for copying memory in the pause; what is more is copied beforehand, or guarded and copied afterwards")
	f.DurationVar(&r.HoldBound, "hold-bound", 200*time.Millisecond, "longest `TIME` that the machine is held; past it, it is let go and the instant tried again")
	f.DurationVar(&r.PauseBound, "pause-bound", 5*time.Second, "longest `TIME` it is held where the guest writes faster than can be copied")
	f.DurationVar(&r.WriteBound, "write-bound", guard.DefaultWriteBound, "longest `TIME` that a write of the guest's waits for guarded memory; past it, the guard is given up and the instant tried again")
	recordDirFlag(c, &r.RecordDir)
	complete(c, false, machineNames)
	completeFlag(c, "mode", words(string(capture.Auto), string(capture.Full), string(capture.Incremental)))
	completeFlag(c, "instant", words(string(capture.Late), string(capture.Early)))
	completeFlag(c, "compression", words(image.Zstd.String(), image.S2.String(), image.None.String()))
	completeFlag(c, "parent", p.imageNames)
	return c
}

func (p *program) capture(ctx context.Context, r jobs.CaptureRequest) (err error) {
	if r.Repository, err = p.repositoryRequest(); err != nil {
		return err
	}
	if err := checkCapture(r); err != nil {
		return &usageError{err}
	}
	// Looked for here as well: what can be told at once is, and the image's name comes from it.
	process, err := r.VM.Find(ctx)
	if err != nil {
		return err
	}
	r.VM.PID = process.PID
	if r.Name == "" {
		r.Name = imageName(process, p.now())
	}
	if err := p.look(); err != nil {
		return err
	}
	meter := p.meter()
	result, err := jobs.Capture(ctx, r, jobs.Handlers[capture.Progress]{
		Started: p.workers.started,
		Progress: func(at capture.Progress) {
			meter.at(at.Phase, int64(at.DonePages*pageset.PageBytes), int64(at.TotalPages*pageset.PageBytes))
		},
	})
	p.workers.ended()
	meter.end()
	p.warnStopped(r.RecordDir, process)
	if err != nil {
		return endedMeanwhile(err, "no image was made")
	}
	return p.captured(ctx, process, result)
}

// captured tells of an image that is there.
func (p *program) captured(ctx context.Context, process *qemu.Process, result *capture.Result) error {
	repository, err := p.open()
	if err != nil {
		return fmt.Errorf("image %s was made, and cannot be looked at: %w", result.Image, err)
	}
	defer repository.Close()
	i, err := repository.Open(ctx, result.Image)
	if err != nil {
		return fmt.Errorf("image %s was made, and cannot be looked at: %w", result.Image, err)
	}
	defer i.Close()
	m := i.Manifest()
	answer := captureJSON{
		Result: result, Repository: p.repository, Kind: "base",
		VM:          vmJSON{process.PID, process.Guest, process.UUID},
		MemoryBytes: m.MemoryBytes(), OwnBytes: m.OwnBytes(), TotalBytes: m.FileBytes(),
		Warnings: disksWarnings(m.Machine),
	}
	if m.Parent != nil {
		answer.Kind = "increment"
	}
	p.answer(answer, func() {
		p.fields(
			field{"image", m.Name},
			field{"kind", kindText(&m, result)},
			field{"size", sizesText(&m)},
			field{"took", tookText(result)},
			field{"paused", pausedText(result)},
			field{"guarded", guardedText(result)},
			field{"witness", witnessText(result)},
			field{"disks", disksText(m.Machine)},
		)
		p.printPauses(result)
		p.printPages(&m)
	})
	return nil
}

// checkCapture refuses what cannot be meant, before anything is looked for.
func checkCapture(r jobs.CaptureRequest) error {
	if r.Name != "" {
		if err := image.CheckName(r.Name); err != nil {
			return err
		}
	}
	if r.Parent != "" {
		if err := image.CheckName(r.Parent); err != nil {
			return err
		}
		if r.Mode == capture.Full {
			return errors.New("--mode full makes a base, which has no --parent")
		}
	}
	if err := capture.CheckAttributes(r.Attributes); err != nil {
		return err
	}
	for name, d := range map[string]time.Duration{"--budget": r.ResidueBudget, "--hold-bound": r.HoldBound, "--pause-bound": r.PauseBound, "--write-bound": r.WriteBound} {
		if d <= 0 {
			return fmt.Errorf("%s: want more than 0", name)
		}
	}
	if r.PauseBound < r.HoldBound {
		return fmt.Errorf("--pause-bound %s is shorter than --hold-bound %s: it is what a hold may take where much is left to copy, and has to be longer",
			spanText(r.PauseBound), spanText(r.HoldBound))
	}
	return nil
}

// imageName makes a name of the machine's and the time: what images allow, in an order that is that of the times.
func imageName(process *qemu.Process, now time.Time) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '.':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		}
		return '-'
	}, process.Guest)
	name = strings.Trim(name, "-.")
	if name == "" {
		name = fmt.Sprintf("pid-%d", process.PID)
	}
	// To the millisecond: increments are taken several times a second.
	const stamp = "20060102t150405.000z"
	const longest = 128 - len("-") - len(stamp)
	return strings.TrimRight(name[:min(len(name), longest)], "-.") + "-" + now.UTC().Format(stamp)
}

// wordFlag is a flag that is one of a few words.
type wordFlag[T ~string] struct {
	value *T
	kind  string
	words []T
}

func (f *wordFlag[T]) String() string {
	if f.value == nil {
		return ""
	}
	return string(*f.value)
}
func (f *wordFlag[T]) Type() string { return f.kind }

func (f *wordFlag[T]) Set(s string) error {
	if slices.Contains(f.words, T(s)) {
		*f.value = T(s)
		return nil
	}
	var most []string
	for _, w := range f.words[:len(f.words)-1] {
		most = append(most, string(w))
	}
	return fmt.Errorf("want %s or %s", strings.Join(most, ", "), f.words[len(f.words)-1])
}

// compressionFlag is a compression as a flag.
type compressionFlag struct{ c *image.Compression }

func (f compressionFlag) String() string {
	if f.c == nil {
		return ""
	}
	return f.c.String()
}
func (f compressionFlag) Type() string { return "compression" }

func (f compressionFlag) Set(s string) (err error) {
	*f.c, err = image.ParseCompression(s)
	return err
}
