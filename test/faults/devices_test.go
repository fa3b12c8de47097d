package faults

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// TestDisksNeverRest: a machine whose disks always have something to flush is not stopped for it. The checkpoint fails, saying so; one that
// comes to rest in time is taken.
func TestDisksNeverRest(t *testing.T) {
	disk := newNBDDisk(t)
	o := options()
	o.Args = disk.arguments()
	b := truth.NewBench(t, o)
	b.Capture(t.Context(), b.Options())

	// A guest that writes to its disk all the time, by QEMU's own means.
	ctx, cancel := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	defer writing.Wait()
	defer cancel()
	writing.Go(func() {
		for ctx.Err() == nil {
			out, err := qemu.Human(ctx, b.Machine.Monitor, `qemu-io slow "write 0 4k"`)
			if ctx.Err() == nil && (err != nil || out != "") {
				t.Errorf("write to the disk: %q, %v", out, err)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})

	t.Run("at last they do", func(t *testing.T) {
		b.T = t
		const slow = 500 * time.Millisecond // for so long
		disk.flush.Store(int64(50 * time.Millisecond))
		time.AfterFunc(slow, func() { disk.flush.Store(0) })
		begin, flushes := time.Now(), disk.flushes.Load()
		result, img := b.Capture(t.Context(), b.Options())
		b.Judge(t.Context(), result, img)
		t.Logf("taken after %v and %d flushes", time.Since(begin), disk.flushes.Load()-flushes)
		if result.Instant.Sub(begin) < slow {
			t.Errorf("the machine was stopped %v after the beginning, while its disk was busy", result.Instant.Sub(begin))
		}
	})
	t.Run("never", func(t *testing.T) {
		b.T = t
		events := b.Machine.Monitor.Subscribe("STOP")
		defer events.Close()
		disk.flush.Store(int64(50 * time.Millisecond))
		defer disk.flush.Store(0)
		_, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options())
		t.Log(err)
		var restless *capture.UnrestfulError
		if !errors.As(err, &restless) || restless.Last < 50*time.Millisecond || restless.Waited < restless.Last {
			t.Errorf("error %v, want that the disks did not come to rest", err)
		}
		select {
		case <-events.C:
			t.Error("the machine was stopped all the same")
		default:
		}
	})
	cancel()
	writing.Wait()
	sound(t, b)
}

// TestResidueBeyondBound: a guest with more to copy than the longest pause there may be is let go, and the checkpoint fails, saying so. Its
// memory is of the kind that cannot be guarded.
func TestResidueBeyondBound(t *testing.T) {
	m := options()
	m.Memory, m.Balloon = machine.Memfd, true
	b := truth.NewBench(t, m)
	b.Capture(t.Context(), b.Options())
	for _, mode := range []capture.Mode{capture.Auto, capture.Full} {
		t.Run(string(mode), func(t *testing.T) {
			b.T = t
			o := b.Options()
			o.Mode, o.ResidueBudget, o.PauseBound = mode, time.Microsecond, 3*time.Microsecond // a page each
			_, err := capture.Run(t.Context(), b.Target, b.Repository, o)
			t.Log(err)
			var residue *capture.ResidueError
			if !errors.As(err, &residue) || residue.Pages <= 3 || residue.Bound != o.PauseBound {
				t.Errorf("error %v, want that the guest writes too fast", err)
			}
			sound(t, b)
		})
	}
}

// TestResidueIsGuarded: what the pause has no time for is guarded, where it can be.
func TestResidueIsGuarded(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	for _, mode := range []capture.Mode{capture.Auto, capture.Full} {
		t.Run(string(mode), func(t *testing.T) {
			b.T = t
			o := b.Options()
			o.Mode, o.ResidueBudget = mode, time.Microsecond
			result, img := b.Capture(t.Context(), o)
			b.Judge(t.Context(), result, img)
			if result.Guard == nil || result.Guard.Pages == 0 {
				t.Error("nothing was guarded")
			}
			sound(t, b)
		})
	}
}

// TestDevicesComeAndGo plugs a device in and out between checkpoints, and in the middle of one when it can only be seen afterwards: the
// image is of the machine as it was at the instant.
func TestDevicesComeAndGo(t *testing.T) {
	for _, version := range []machine.Version{machine.V72, machine.V10} {
		t.Run(string(version), func(t *testing.T) {
			o := options()
			o.QEMU = version
			o.Args = []string{"-device", "virtio-scsi-pci-non-transitional,id=scsi,bus=pcie.0,addr=0x1c"}
			b := truth.NewBench(t, o)
			b.Capture(t.Context(), b.Options())
			plug := func() error {
				return b.Machine.Monitor.Execute(t.Context(), "device_add", map[string]string{"driver": "scsi-cd", "bus": "scsi.0", "id": "plugged"}, nil)
			}
			unplug := func() error {
				return b.Machine.Monitor.Execute(t.Context(), "device_del", map[string]string{"id": "plugged"}, nil)
			}
			for _, c := range []struct {
				name   string
				change func() error
				at     capture.Step // "": before it begins
				there  bool         // afterwards
			}{
				{"plugged in before", plug, "", true},
				{"plugged out before", unplug, "", false},
				{"plugged in meanwhile", plug, capture.StepArmed, true},
				{"plugged out meanwhile", unplug, capture.StepArmed, false},
				{"plugged in early", plug, capture.StepInvalidated, true},
				{"plugged out early", unplug, capture.StepInvalidated, false},
				{"plugged in in a round", plug, capture.StepHarvested, true},
				{"plugged out in a round", unplug, capture.StepCopied, false},
			} {
				t.Run(c.name, func(t *testing.T) {
					b.T = t
					o := through(b, c.at)
					changed := false
					change := func() {
						changed = true
						if err := c.change(); err != nil {
							t.Error(err)
						}
					}
					if c.at == "" {
						change()
					}
					o.Hooks.Step = func(at capture.Step) {
						if at == c.at && !changed {
							change()
						}
					}
					result, img := b.Capture(t.Context(), o)
					b.Judge(t.Context(), result, img)
					t.Logf("%d attempts", result.Attempts)
					if !changed {
						t.Errorf("the step %q never came", c.at)
					}
					if c.at != "" && result.Attempts < 2 {
						t.Errorf("%d attempts, want that the first one did not count", result.Attempts)
					}
					if there := describes(t, img); there != c.there {
						t.Errorf("the device is in the image: %v, want %v", there, c.there)
					}
					sound(t, b)
				})
			}
		})
	}
}

// describes says whether the device that is plugged in and out is in an image: its state and the machine's description agree about it.
func describes(t *testing.T, img *image.Image) bool {
	t.Helper()
	stream, err := img.DeviceState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := devstate.Parse(stream)
	if err != nil {
		t.Fatal(err)
	}
	state := slices.ContainsFunc(parsed.Sections, func(s devstate.Section) bool { return strings.Contains(s.Name, "scsi-disk") })
	description := bytes.Contains(img.Manifest().Machine, []byte("scsi-cd"))
	if state != description {
		t.Errorf("the device is in the device state: %v, in the machine's description: %v", state, description)
	}
	return state
}
