package agent_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/test/machine"
)

func inPlace(o *vmckptv1.VMRestore) { o.Spec.Target.Mode = vmckptv1.RestoreInPlace }

// TestRestoreIsRefused where the image is not what was meant, or not the machine's; nothing is touched.
func TestRestoreIsRefused(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	r.agent(node, nil)
	c := r.checkpoint("first", vmi, nil)
	r.ready(c, vmckptv1.ReasonCaptured)

	back := r.restore("back", "first", vmi, inPlace)
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() || back.Status.Digest != c.Status.Image.Digest || back.Status.InstantTime == nil {
		t.Fatalf("restored: %s: %+v", message(back.Status.Conditions), back.Status)
	}
	// The controller says which image the checkpoint's object stands for; another of the same name is another.
	other := r.unbound("other", "first", vmi, inPlace)
	other.Status.Digest = strings.Repeat("0", 64)
	r.bind(other, vmi)
	wait(r, other, "the refusal", (*vmckptv1.VMRestore).Done)
	if got := message(other.Status.Conditions); other.Ready() || !strings.HasPrefix(got, "OtherImage: ") {
		t.Errorf("restore of another image: %s", got)
	}

	missing := r.restore("missing", "nothing", vmi, func(o *vmckptv1.VMRestore) {
		inPlace(o)
		o.Spec.Timeout = metav1.Duration{Duration: 3 * time.Second}
	})
	wait(r, missing, "the refusal", (*vmckptv1.VMRestore).Done)
	if got := message(missing.Status.Conditions); missing.Ready() || !strings.Contains(got, "not found") {
		t.Errorf("restore of what is not there: %s", got)
	}

	// A machine that runs is not overwritten where a paused one is meant.
	running := r.restore("running", "first", vmi, func(o *vmckptv1.VMRestore) { o.Spec.Timeout = metav1.Duration{Duration: 5 * time.Second} })
	wait(r, running, "the refusal", (*vmckptv1.VMRestore).Done)
	if got := message(running.Status.Conditions); running.Ready() || !strings.Contains(got, "running") {
		t.Errorf("restore into a running machine: %s", got)
	}
	goesOn(t, m)

	// Another memory size.
	r.must(m.Kill())
	machine.Start(t, machine.Options{Name: m.Options().Name, UUID: m.Options().UUID, MemoryBytes: 32 * machine.MiB, Paused: true, Guest: machine.Idle{}})
	mismatch := r.restore("mismatch", "first", vmi, nil)
	wait(r, mismatch, "the refusal", (*vmckptv1.VMRestore).Done)
	if got := message(mismatch.Status.Conditions); mismatch.Ready() || !strings.HasPrefix(got, "Mismatch: ") || !strings.Contains(got, "pc.ram: 67108864 bytes in the image") {
		t.Errorf("restore into a smaller machine: %s", got)
	}
}

// TestMemoryInvalid is said as soon as it is known, and taken back when another attempt has made the machine whole.
func TestMemoryInvalid(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	lost := &restore.InvalidMemoryError{Mark: restore.Mark{}, Err: errors.New("the worker was killed")}
	g := &gate{fail: []error{lost, lost}}
	r.agent(node, func(o *agent.Options) {
		o.Engine = g
		o.RetryAfter = func(n int) time.Duration {
			if n == 2 {
				return 2 * time.Second // for the test to look
			}
			return time.Millisecond
		}
	})
	c := r.checkpoint("first", vmi, nil)
	r.ready(c, vmckptv1.ReasonCaptured)
	back := r.restore("back", "first", vmi, inPlace)
	wait(r, back, "the mark", func(o *vmckptv1.VMRestore) bool {
		return o.Status.Attempts == 2 && meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
	})
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() || !meta.IsStatusConditionFalse(back.Status.Conditions, vmckptv1.ConditionMemoryInvalid) || back.Status.Attempts != 3 {
		t.Errorf("%s: %+v", message(back.Status.Conditions), back.Status)
	}
	goesOn(t, m)
}

// TestRestoreAndCheckpointTakeTurns on one machine, and a restore of a machine that is gone waits for it.
func TestRestoreWaits(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
	r.agent(node, func(o *agent.Options) { o.Engine, o.Slots = g, 4 })
	c := r.checkpoint("first", vmi, nil)
	<-g.reached
	back := r.restore("back", "first", vmi, inPlace)
	wait(r, back, "its turn", func(o *vmckptv1.VMRestore) bool { return o.Status.Phase == vmckptv1.RestoreQueued })
	close(g.before)
	r.ready(c, vmckptv1.ReasonCaptured)
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() {
		t.Error(message(back.Status.Conditions))
	}
	goesOn(t, m)

	r.must(m.Kill())
	late := r.restore("late", "first", vmi, nil)
	wait(r, late, "the machine to be looked for again", func(o *vmckptv1.VMRestore) bool { return o.Status.Attempts > 1 })
	r.must(r.Delete(t.Context(), vmi))
	wait(r, late, "the restore given back", func(o *vmckptv1.VMRestore) bool { return o.Status.NodeName == "" })
	if got := message(late.Status.Conditions); !strings.HasPrefix(got, "WaitingForVM: ") || late.Done() {
		t.Errorf("restore of a machine that is gone: %s", got)
	}
	r.must(r.Delete(t.Context(), back))
	r.gone(back)
}

// TestRestoredOnce shows that a restore whose end could not be told is not done again: the guest has gone on since.
func TestRestoredOnce(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	first := &gate{restoredAfter: make(chan struct{})}
	stop := r.agent(node, func(o *agent.Options) { o.Engine = first })
	c := r.checkpoint("first", vmi, nil)
	r.ready(c, vmckptv1.ReasonCaptured)
	r.server.Client(t)
	back := r.unbound("back", "first", vmi, inPlace)
	first.onRestored = func() { r.server.StopAPIServer(t) }
	r.bind(back, vmi)
	<-first.restoredAfter
	ended := make(chan struct{})
	go func() {
		stop()
		close(ended)
	}()
	goesOn(t, m)
	r.server.StartAPIServer(t)
	<-ended
	second := &gate{}
	r.agent(node, func(o *agent.Options) { o.Engine = second })
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() || second.restored != 0 || first.restored != 1 {
		t.Errorf("restored %d and %d times: %s", first.restored, second.restored, message(back.Status.Conditions))
	}
	goesOn(t, m)
}
