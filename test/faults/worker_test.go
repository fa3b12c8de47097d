package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/truth"
)

// doomed asks for a capture in a worker that comes to grief.
type doomed struct {
	PID        int
	Socket     string
	Domain     string // "" where Socket is QEMU's own
	Repository string
	Options    capture.Options

	At     capture.Step // where it is to happen; "" for nowhere
	Signal unix.Signal  // what the worker sends itself there; 0: it says that it is there, and waits for what comes
	Join   string       // the file of a family to be written to at the beginning
}

// key is that of all repositories here.
var key = image.Keys{Secret: [32]byte{1, 2, 3}}

func doomedCapture(ctx context.Context, request json.RawMessage, progress func(any)) (any, error) {
	var r doomed
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, err
	}
	if r.Join != "" {
		if err := os.WriteFile(r.Join, []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return nil, fmt.Errorf("join the family: %w", err)
		}
	}
	process, err := qemu.Find(ctx, qemu.Selector{PID: r.PID})
	if err != nil {
		return nil, err
	}
	monitor, err := dial(ctx, r)
	if err != nil {
		return nil, err
	}
	repository, err := image.OpenRepository(r.Repository, key)
	if err != nil {
		return nil, err
	}
	if r.At != "" {
		r.Options.Hooks.Step = func(at capture.Step) {
			if at != r.At {
				return
			}
			if r.Signal != 0 {
				unix.Kill(os.Getpid(), r.Signal) //nolint:errcheck // the test shows
			}
			progress(at)
			select {}
		}
	}
	return capture.Run(ctx, capture.Target{Process: process, Monitor: monitor}, repository, r.Options)
}

// dial connects as package jobs does: by the socket that the supervisor holds too.
func dial(ctx context.Context, r doomed) (qemu.Monitor, error) {
	socket := supervise.Files(ctx)[0]
	if r.Domain == "" {
		return qemu.DialOn(ctx, socket, r.Socket)
	}
	socket.Close()
	return qemu.DialLibvirt(ctx, r.Socket, r.Domain)
}

// doom has a checkpoint taken by a worker that will not end well. The machine's monitor is the worker's meanwhile.
func doom(t *testing.T, b *truth.Bench, request doomed, o supervise.Options) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b.Disconnect()
	defer b.Connect()
	request.PID, request.Socket, request.Domain, request.Repository = b.Machine.PID, b.Machine.Socket, b.Machine.Domain, b.Dir
	request.Options.Hooks = capture.Hooks{}
	o.Grace = time.Second
	socket, err := qemu.NewSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Settle(socket)
	o.Files = []*os.File{socket}
	return supervise.Run(ctx, "doomed capture", request, nil, o)
}

// killedAt kills a worker at a step: alone, or with its family where there is one.
func killedAt(t *testing.T, b *truth.Bench, step capture.Step, f family) {
	t.Helper()
	b.T = t
	request := doomed{Options: through(b, step), At: step, Signal: unix.SIGKILL}
	var o supervise.Options
	var members []int
	if f != nil {
		request.Signal, request.Join = 0, f.join()
		o.Started = f.begin
		o.Progress = func(json.RawMessage) {
			members = f.members()
			if err := f.kill(); err != nil {
				t.Error(err)
			}
		}
	}
	err := doom(t, b, request, o)
	var died *supervise.DiedError
	if !errors.As(err, &died) {
		t.Fatalf("the worker was to be killed at %q; it ended with %v", step, err)
	}
	if f != nil {
		// Between the arming and the end of the stream the leash's holder is one of them.
		least := 1
		if !before(step, capture.StepArmed) && before(step, capture.StepUnguarded) {
			least = 2
		}
		if len(members) < least {
			t.Errorf("processes %v were killed at %q, want %d at the least", members, step, least)
		}
		outlived(t, members)
	}
	sound(t, b)
}

// outlived complains of processes that were to be killed and live.
func outlived(t *testing.T, members []int) {
	t.Helper()
	for _, pid := range members {
		if !within(5*time.Second, func() bool { return ended(pid) }) {
			t.Errorf("process %d has outlived its family", pid)
		}
	}
}

// TestWorkerKilled kills the worker at each step, alone and with all that it has started.
func TestWorkerKilled(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	f := newFamily(t)
	tried := 0
	for _, step := range capture.Steps {
		times := *repeat
		if !before(step, capture.StepScanned) && before(step, capture.StepRecorded) {
			times *= 2
		}
		for range times {
			for _, f := range []family{nil, f} {
				t.Run(fmt.Sprintf("%s/family=%v", step, f != nil), func(t *testing.T) {
					killedAt(t, b, step, f)
					tried++
				})
			}
		}
	}
	t.Logf("%d workers killed", tried)
}

// TestWorkerKilledAnyTime kills at no step in particular, every other time with the family.
func TestWorkerKilledAnyTime(t *testing.T) {
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	f := newFamily(t)
	killed := 0
	for i := range 8 * *repeat {
		request := doomed{Options: b.Options()}
		if rand.IntN(4) == 0 {
			request.Options.Mode = capture.Full
		}
		var wrong error
		kill := func(pid int) error { return unix.Kill(pid, unix.SIGKILL) }
		if i%2 == 1 {
			request.Join = f.join()
			kill = func(int) error { return f.kill() }
		}
		after := time.Duration(rand.Int64N(int64(150 * time.Millisecond)))
		done := make(chan struct{})
		err := doom(t, b, request, supervise.Options{Started: func(pid int) {
			f.begin(pid)
			time.AfterFunc(after, func() {
				defer close(done)
				if err := kill(pid); err != nil && !errors.Is(err, unix.ESRCH) {
					wrong = err
				}
			})
		}})
		<-done
		var died *supervise.DiedError
		switch {
		case wrong != nil:
			t.Fatal(wrong)
		case errors.As(err, &died):
			killed++
		case err != nil:
			t.Fatal(err)
		}
		sound(t, b)
	}
	t.Logf("%d of %d workers were killed before they were done", killed, 8**repeat)
}

// TestKilledInjecting kills the worker, its family, or the helper alone while the helper has system calls executed in QEMU.
func TestKilledInjecting(t *testing.T) {
	b := truth.NewBench(t, options())
	f := newFamily(t)
	for _, victim := range []string{"worker", "family", "helper"} {
		t.Run(victim, func(t *testing.T) {
			b.T = t
			met := 0
			for i := range 3 * *repeat {
				// Where nothing is known of the machine all that is needed in QEMU is made anew.
				b.RecordDir = t.TempDir()
				request := doomed{Options: b.Options(), Join: f.join()}
				hit := make(chan bool, 1)
				gone := make(chan struct{})
				err := doom(t, b, request, supervise.Options{Started: func(pid int) {
					f.begin(pid)
					go func() {
						helper := 0
						for n, last := 0, 0; n <= i%3; { // one call after the other
							select {
							case <-gone:
								hit <- false
								return
							default:
							}
							if helper = injecting(f); helper != 0 && helper != last {
								n, last = n+1, helper
							}
						}
						time.Sleep(time.Duration(rand.Int64N(int64(4 * time.Millisecond))))
						hit <- !ended(helper)
						switch victim {
						case "worker":
							unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // the end shows
						case "helper":
							unix.Kill(helper, unix.SIGKILL) //nolint:errcheck // the same
						case "family":
							if err := f.kill(); err != nil {
								t.Error(err)
							}
						}
					}()
				}})
				close(gone)
				var died *supervise.DiedError
				switch {
				case <-hit:
					met++
					if errors.As(err, &died) != (victim != "helper") {
						t.Errorf("the %s was to be killed; the worker ended with %v", victim, err)
					}
				case err != nil && !errors.As(err, &died):
					t.Errorf("nothing was killed in time; the worker ended with %v", err)
				}
				t.Logf("%v", err)
				sound(t, b)
			}
			t.Logf("%d helpers were at work", met)
			if met == 0 {
				t.Error("the helper was never met at work")
			}
		})
	}
}

// injecting returns the member of a family that has system calls executed in another process; 0 where there is none.
func injecting(f family) int {
	for _, pid := range f.members() {
		if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && string(line) == "vmckpt-inject\x00" {
			return pid
		}
	}
	return 0
}

// TestWorkerStopped stops the worker while the machine is held. Nobody watches the holder then but the kernel's timer, which has to
// give the guest back within the bound.
func TestWorkerStopped(t *testing.T) {
	const bound = 300 * time.Millisecond
	b := truth.NewBench(t, options())
	b.Capture(t.Context(), b.Options())
	for _, step := range []capture.Step{capture.StepSent, capture.StepHeld, capture.StepScanned, capture.StepResidue, capture.StepRearmed} {
		t.Run(string(step), func(t *testing.T) {
			b.T = t
			events := b.Machine.Monitor.Subscribe("STOP", "RESUME")
			defer events.Close()
			request := doomed{Options: through(b, step), At: step, Signal: unix.SIGSTOP}
			request.Options.HoldBound = bound
			worker := make(chan int, 1)
			end := make(chan error, 1)
			go func() {
				defer close(end)
				defer close(worker)
				end <- doom(t, b, request, supervise.Options{Started: func(pid int) { worker <- pid }})
			}()
			pid := <-worker
			if pid == 0 {
				t.Fatalf("no worker: %v", <-end)
			}
			defer func() {
				unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it has ended, unless the test fails
				for range end {
				}
			}()
			ours := func() bool { return state(pid) == 'T' }
			if !within(20*time.Second, ours) {
				t.Errorf("the worker does not stop: %c", state(pid))
			}
			if stopped, ok := event(t, events, "STOP"); ok {
				resumed, ok := event(t, events, "RESUME")
				if !ok {
					t.Fatal("no RESUME of the machine")
				}
				stood := resumed.Sub(stopped)
				t.Logf("the guest stood still for %v", stood)
				if stood > bound+slack || stood < bound/2 {
					t.Errorf("the guest stood still for %v, want it to be held and to come free after %v", stood, bound)
				}
			} else if step != capture.StepSent { // the command may not have left the worker
				t.Fatal("no STOP of the machine")
			}
			goesOn(t, b.Machine)
			if !ours() {
				t.Errorf("the worker goes on: %c", state(pid))
			}
			unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // the end shows
			var died *supervise.DiedError
			if err := <-end; !errors.As(err, &died) {
				t.Fatalf("the worker was to be killed; it ended with %v", err)
			}
			sound(t, b)
		})
	}
}

// slack is how much later than its bound a hold may end on a machine that has other things to do as well.
const slack = time.Second

// event returns when the next event, which has to be that one, happened, and false where none comes.
func event(t *testing.T, events *qemu.Subscription, name string) (time.Time, bool) {
	t.Helper()
	select {
	case e, ok := <-events.C:
		if !ok || e.Name != name {
			t.Fatalf("event %+v, want %s (%v)", e, name, events.Err())
		}
		return e.Time, true
	case <-time.After(2 * time.Second):
		return time.Time{}, false
	}
}
