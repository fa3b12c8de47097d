package agent_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/test/machine"
)

// held stops the worker of the next restore in the middle, at the first that is told of the mark, and says its pid.
func held(g *gate) <-chan int {
	worker := make(chan int, 1)
	g.at = func(pid int, p restore.Progress) {
		if p.MemoryInvalid && g.at != nil {
			g.at = nil
			unix.Kill(pid, unix.SIGSTOP) //nolint:errcheck // a worker that has ended shows in the test
			worker <- pid
		}
	}
	return worker
}

// reached waits for something that the engine comes to.
func reached[T any](r *rig, what string, c <-chan T) T {
	r.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(bound):
		r.Fatalf("waited for %s", what)
		panic("unreachable")
	}
}

func invalid(o *vmckptv1.VMRestore) bool {
	return meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
}

// told waits for an event about an object that says something.
func (r *rig) told(o client.Object, what string) {
	r.Helper()
	for until := time.Now().Add(bound); ; time.Sleep(20 * time.Millisecond) {
		var list eventsv1.EventList
		r.must(r.List(r.Context(), &list, client.InNamespace(o.GetNamespace())))
		for _, e := range list.Items {
			if e.Regarding.UID == o.GetUID() && e.Type == "Warning" && strings.Contains(e.Note, what) {
				return
			}
		}
		if time.Now().After(until) {
			r.Fatalf("no event tells %s of %q: %+v", o.GetName(), what, list.Items)
		}
	}
}

// stands fails unless the machine stands paused.
func stands(t *testing.T, m *machine.Machine) {
	t.Helper()
	if state, err := qemu.Status(t.Context(), m.Monitor); err != nil || state == qemu.StateRunning {
		t.Fatalf("the machine is %s (%v)", state, err)
	}
}

// TestMark is told while memory is being overwritten, and taken back in the end.
func TestMark(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{}
	r.agent(node, func(o *agent.Options) { o.Engine = g })
	r.ready(r.checkpoint("first", vmi, nil), vmckptv1.ReasonCaptured)
	worker := held(g)
	back := r.restore("back", "first", vmi, inPlace)
	pid := reached(r, "the mark", worker)
	wait(r, back, "the mark", invalid)
	if back.Done() || back.Status.Attempts != 1 {
		t.Errorf("%s: %+v", message(back.Status.Conditions), back.Status)
	}
	r.must(unix.Kill(pid, unix.SIGCONT))
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() || !meta.IsStatusConditionFalse(back.Status.Conditions, vmckptv1.ConditionMemoryInvalid) {
		t.Errorf("%s: %+v", message(back.Status.Conditions), back.Status)
	}
	goesOn(t, m)
}

// TestTornAndDeleted: a restore whose worker was killed in the middle, and whose object is deleted. The machine is told of, stands, is not captured,
// and another restore makes it whole.
func TestTornAndDeleted(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{}
	r.agent(node, func(o *agent.Options) {
		o.Engine = g
		o.RetryAfter = func(int) time.Duration { return time.Hour }
	})
	r.ready(r.checkpoint("first", vmi, nil), vmckptv1.ReasonCaptured)
	worker := held(g)
	torn := r.restore("torn", "first", vmi, inPlace)
	r.must(unix.Kill(reached(r, "the mark", worker), unix.SIGKILL))
	wait(r, torn, "the end of the attempt", func(o *vmckptv1.VMRestore) bool { return o.Status.Phase == vmckptv1.RestoreQueued })
	if got := message(torn.Status.Conditions); !invalid(torn) || !strings.Contains(got, "only a restore makes it whole") {
		t.Errorf("torn: %s", got)
	}
	r.told(vmi, "must not run")
	r.must(r.Delete(t.Context(), torn))
	r.gone(torn)
	r.told(torn, "was deleted")
	r.told(vmi, "restore torn was deleted")
	stands(t, m)

	refused := r.checkpoint("refused", vmi, nil)
	wait(r, refused, "the refusal", func(c *vmckptv1.VMCheckpoint) bool {
		return strings.Contains(message(c.Status.Conditions), "is invalid")
	})
	r.must(r.Delete(t.Context(), refused))
	r.gone(refused)
	again := r.restore("again", "first", vmi, inPlace)
	wait(r, again, "the restore", (*vmckptv1.VMRestore).Done)
	if !again.Ready() {
		t.Error(message(again.Status.Conditions))
	}
	goesOn(t, m)
}

// TestTornPastItsTime is repeated all the same.
func TestTornPastItsTime(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{fail: []error{&restore.InvalidMemoryError{Err: errors.New("the worker was killed")}}}
	r.agent(node, func(o *agent.Options) {
		o.Engine = g
		o.RetryAfter = func(int) time.Duration { return 3 * time.Second }
	})
	r.ready(r.checkpoint("first", vmi, nil), vmckptv1.ReasonCaptured)
	back := r.restore("back", "first", vmi, func(o *vmckptv1.VMRestore) {
		inPlace(o)
		o.Spec.Timeout = metav1.Duration{Duration: 2 * time.Second}
	})
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() || back.Status.Attempts != 2 {
		t.Errorf("%d attempts: %s", back.Status.Attempts, message(back.Status.Conditions))
	}
	goesOn(t, m)
}

// TestLeftStopped: a restore is killed when it has stopped the machine, which cannot be let go on, and is given up. Whose doing it is that the machine
// stands is said, and what to do.
func TestLeftStopped(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	stopped := func(o *vmckptv1.VMRestore) bool {
		return meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionLeftStopped)
	}
	g := &gate{}
	ended := make(chan struct{})
	g.at = func(pid int, _ restore.Progress) {
		notes, err := filepath.Glob(filepath.Join(r.records, "*.stopped"))
		if err != nil || len(notes) == 0 {
			return
		}
		if state, err := qemu.Status(t.Context(), m.Monitor); err != nil || state == qemu.StateRunning {
			return
		}
		g.at = nil
		unix.Kill(m.PID, unix.SIGSTOP) //nolint:errcheck // shows in what follows
		unix.Kill(pid, unix.SIGKILL)   //nolint:errcheck // the same
		close(ended)
	}
	stop := r.agent(node, func(o *agent.Options) {
		o.Engine = g
		o.RetryAfter = func(int) time.Duration { return time.Hour }
	})
	r.ready(r.checkpoint("first", vmi, nil), vmckptv1.ReasonCaptured)
	r.ready(r.checkpoint("spare", vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.Mode = vmckptv1.ModeFull }), vmckptv1.ReasonCaptured)
	back := r.restore("back", "first", vmi, inPlace)
	reached(r, "the stop", ended)
	wait(r, back, "the machine to be missed", stopped)
	r.must(unix.Kill(m.PID, unix.SIGCONT))
	if got := message(back.Status.Conditions); back.Done() || invalid(back) || !strings.Contains(got, "unpause it") {
		t.Errorf("left stopped: %s", got)
	}
	r.told(vmi, "unpause it")
	stop()

	// The next attempt is the last: the image is damaged.
	r.damage(volume, "first")
	r.agent(node, nil)
	wait(r, back, "the end", (*vmckptv1.VMRestore).Done)
	if got := message(back.Status.Conditions); back.Ready() || !stopped(back) || !strings.HasPrefix(got, "Damaged: ") || !strings.Contains(got, "unpause it") {
		t.Errorf("given up: %s", got)
	}
	stands(t, m)
	r.must(m.Monitor.Execute(t.Context(), "cont", nil, nil))
	goesOn(t, m)
	again := r.restore("again", "spare", vmi, inPlace)
	wait(r, again, "another restore", (*vmckptv1.VMRestore).Done)
	if !again.Ready() {
		t.Error(message(again.Status.Conditions))
	}
	wait(r, back, "what was left to be put right", func(o *vmckptv1.VMRestore) bool { return !stopped(o) })
}
