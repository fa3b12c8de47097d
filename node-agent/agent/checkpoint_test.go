package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

// ready fails unless the checkpoint becomes ready for the reason.
func (r *rig) ready(c *vmckptv1.VMCheckpoint, reason string) {
	r.Helper()
	wait(r, c, c.Name, done)
	if got := message(c.Status.Conditions); !c.Ready() || !strings.HasPrefix(got, reason+": ") {
		r.Fatalf("%s is not ready by %s: %s", c.Name, reason, got)
	}
}

// goesOn fails unless the guest is at work, and never found a page that it did not write.
func goesOn(t *testing.T, m *machine.Machine) {
	t.Helper()
	at, _, err := m.WriterStatus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	now, err := m.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Passes > at.Passes+2 })
	if err != nil || now.Errors != 0 {
		t.Fatalf("the guest went from %+v to %+v: %v", at, now, err)
	}
}

// TestAnotherNode shows that an agent does not touch what is bound to another node, and gives back what is bound to its own while the machine
// is elsewhere.
func TestAnotherNode(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	_, vmi := r.machine("vm", false)
	g := &gate{}
	r.agent("node-b", func(o *agent.Options) { o.Engine = g })
	mine := r.checkpoint("mine", vmi, nil) // of node-a, which has no agent
	wrong := r.checkpoint("wrong", vmi, nil)
	wrong.Status.NodeName = "node-b"
	r.must(r.Status().Update(t.Context(), wrong))
	wait(r, wrong, "the checkpoint given back", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.NodeName == "" })
	if got := message(wrong.Status.Conditions); !strings.Contains(got, `has moved to node "node-a"`) || wrong.Status.VMIUID != "" || wrong.Status.Phase != vmckptv1.CheckpointPending {
		t.Errorf("given back with %s: %+v", got, wrong.Status)
	}
	before := mine.ResourceVersion
	wait(r, mine, "nothing", func(*vmckptv1.VMCheckpoint) bool { return true })
	if mine.ResourceVersion != before || len(g.captured()) != 0 {
		t.Errorf("the agent of node-b touched what is node-a's: %+v, %v", mine.Status, g.captured())
	}
	// Another instance of the same name is another machine.
	r.agent(node, func(o *agent.Options) { o.Engine = g })
	wait(r, mine, "the checkpoint of node-a", done)
	anew := r.checkpoint("anew", vmi, nil)
	_ = anew
	other := r.checkpoint("other", vmi, func(c *vmckptv1.VMCheckpoint) {})
	wait(r, other, "one", done)
	stale := vmi.DeepCopy()
	stale.UID = "00000000-0000-0000-0000-000000000000"
	last := r.checkpoint("last", stale, nil)
	wait(r, last, "the checkpoint given back", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.NodeName == "" })
	if got := message(last.Status.Conditions); !strings.Contains(got, "was started anew") {
		t.Error(got)
	}
}

// TestImages that are on the claim already are taken over, and never written over.
func TestImages(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{}
	r.agent(node, func(o *agent.Options) { o.Engine = g })
	first := r.checkpoint("first", vmi, nil)
	r.ready(first, vmckptv1.ReasonCaptured)

	// As an object: verified, with all that is known of it.
	imported := r.checkpoint("imported", nil, func(c *vmckptv1.VMCheckpoint) {
		c.Spec.Import, c.Spec.DeletionPolicy = &vmckptv1.Import{Image: "first"}, vmckptv1.DeletionRetain
	})
	r.ready(imported, vmckptv1.ReasonAdopted)
	if imported.Status.Image.Digest != first.Status.Image.Digest || imported.Status.InstantTime == nil || imported.Status.Size.Cmp(*first.Status.Size) != 0 {
		t.Errorf("imported: %+v", imported.Status)
	}

	// Of the same name, of an object that was deleted while the image was kept: whoever makes it anew wants a new image, under a new name.
	r.must(r.Get(t.Context(), types.NamespacedName{Namespace: r.namespace, Name: "first"}, first))
	first.Finalizers = nil
	r.must(r.Update(t.Context(), first))
	r.must(r.Delete(t.Context(), first))
	r.gone(first)
	first = r.checkpoint("first", vmi, nil)
	wait(r, first, "the refusal", done)
	if got := message(first.Status.Conditions); first.Ready() || !strings.HasPrefix(got, "Exists: ") {
		t.Errorf("made anew: %s", got)
	}
	if got := g.captured(); !slices.Equal(got, []string{"first"}) {
		t.Errorf("captured: %v", got)
	}

	// Of another's name.
	taken := r.checkpoint("taken", vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.Mode = vmckptv1.ModeFull })
	r.ready(taken, vmckptv1.ReasonCaptured)
	missing := r.checkpoint("missing", nil, func(c *vmckptv1.VMCheckpoint) {
		c.Spec.Import, c.Spec.Timeout = &vmckptv1.Import{Image: "nothing"}, metav1.Duration{Duration: time.Second}
	})
	wait(r, missing, "an import of what is not there", done)
	if got := message(missing.Status.Conditions); missing.Ready() || !strings.Contains(got, "not found") {
		t.Errorf("an import of what is not there: %s", got)
	}

	// One that is damaged is refused, with the place.
	r.damage(volume, "taken")
	damaged := r.checkpoint("damaged", nil, func(c *vmckptv1.VMCheckpoint) { c.Spec.Import = &vmckptv1.Import{Image: "taken"} })
	wait(r, damaged, "an import of what is damaged", done)
	if got := message(damaged.Status.Conditions); damaged.Ready() || !strings.HasPrefix(got, "Damaged: ") || !strings.Contains(got, ".pages") {
		t.Errorf("an import of what is damaged: %s", got)
	}
	goesOn(t, m)
}

// TestDeletedBeforeItBegins, while it runs, and when it is done.
func TestDeleted(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
	r.agent(node, func(o *agent.Options) { o.Engine, o.Slots = g, 1 })
	running := r.checkpoint("running", vmi, nil)
	<-g.reached
	queued := r.checkpoint("queued", vmi, nil)
	wait(r, queued, "a place in the queue", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.Phase == vmckptv1.CheckpointQueued })
	wait(r, running, "running", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.Phase == vmckptv1.CheckpointRunning })
	r.must(r.Delete(t.Context(), queued))
	r.gone(queued)
	r.must(r.Delete(t.Context(), running))
	r.gone(running)
	if got := g.captured(); len(got) != 0 {
		t.Errorf("captured all the same: %v", got)
	}
	close(g.before)
	goesOn(t, m)

	kept := r.checkpoint("kept", vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.DeletionPolicy = vmckptv1.DeletionRetain })
	r.ready(kept, vmckptv1.ReasonCaptured)
	lost := r.checkpoint("lost", vmi, nil)
	r.ready(lost, vmckptv1.ReasonCaptured)
	// Two objects stand for one image: it goes with the last.
	twin := r.checkpoint("twin", nil, func(c *vmckptv1.VMCheckpoint) { c.Spec.Import = &vmckptv1.Import{Image: "lost"} })
	r.ready(twin, vmckptv1.ReasonAdopted)
	for _, step := range []struct {
		o    *vmckptv1.VMCheckpoint
		left []string
	}{{kept, []string{"kept", "lost"}}, {lost, []string{"kept", "lost"}}, {twin, []string{"kept"}}} {
		r.must(r.Delete(t.Context(), step.o))
		r.gone(step.o)
		if got := images(t, volume); !slices.Equal(got, step.left) {
			t.Errorf("after %s was deleted: %v, want %v", step.o.Name, got, step.left)
		}
	}
	if left, err := os.ReadDir(filepath.Join(volume, "vmckpt", "tmp")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestAgentEnds in the middle of a capture, and another goes on: nothing is captured twice that was whole.
func TestAgentEnds(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
	stop := r.agent(node, func(o *agent.Options) { o.Engine = g })
	half := r.checkpoint("half", vmi, nil)
	<-g.reached
	stop()
	wait(r, half, "the checkpoint as the agent left it", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.Phase == vmckptv1.CheckpointRunning })

	sealed := &gate{after: make(chan struct{}), reached: make(chan string, 8)}
	stop = r.agent(node, func(o *agent.Options) { o.Engine = sealed })
	<-sealed.reached // the image is there, and the object does not know
	stop()
	if got := images(t, volume); !slices.Equal(got, []string{"half"}) {
		t.Fatalf("images: %v", got)
	}
	last := &gate{}
	r.agent(node, func(o *agent.Options) { o.Engine = last })
	r.ready(half, vmckptv1.ReasonCaptured)
	if got := last.captured(); len(got) != 0 || half.Status.Attempts != 3 || half.Status.Downtime == nil {
		t.Errorf("captured again: %v; %+v", got, half.Status)
	}
	goesOn(t, m)
}

// TestAPIServerGone in the middle of a capture: the capture goes on, and its end is told when there is somebody to be told.
func TestAPIServerGone(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
	r.agent(node, func(o *agent.Options) { o.Engine = g })
	c := r.checkpoint("unheard", vmi, nil)
	<-g.reached
	r.server.StopAPIServer(t)
	close(g.before)
	for until := time.Now().Add(bound); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(volume, "vmckpt/images/unheard/manifest.json")); err == nil {
			break
		}
		if time.Now().After(until) {
			t.Fatal("no image came without the API server")
		}
	}
	goesOn(t, m)
	r.server.StartAPIServer(t)
	r.ready(c, vmckptv1.ReasonCaptured)
	if c.Status.Attempts != 1 {
		t.Errorf("attempts: %d", c.Status.Attempts)
	}
}

// TestTimeout ends a capture that takes too long, and one for which there is no more time after a failure.
func TestTimeout(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	m, vmi := r.machine("vm", false)
	g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
	r.agent(node, func(o *agent.Options) { o.Engine = g })
	short := func(c *vmckptv1.VMCheckpoint) { c.Spec.Timeout = metav1.Duration{Duration: time.Second} }
	slow := r.checkpoint("slow", vmi, short)
	wait(r, slow, "the end of its time", done)
	if got := message(slow.Status.Conditions); slow.Ready() || !strings.HasPrefix(got, "Timeout: ") || !meta.IsStatusConditionTrue(slow.Status.Conditions, vmckptv1.ConditionStalled) {
		t.Errorf("slow: %s", got)
	}
	homeless := r.checkpoint("homeless", vmi, func(c *vmckptv1.VMCheckpoint) {
		short(c)
		c.Spec.Storage.ClaimName = "nowhere"
	})
	wait(r, homeless, "the end of its time", done)
	if got := message(homeless.Status.Conditions); homeless.Ready() || !strings.Contains(got, "there is none of that name") {
		t.Errorf("homeless: %s", got)
	}
	goesOn(t, m)
}

// skewed is a clock that is wrong.
type skewed struct {
	clock.RealClock
	by time.Duration
}

func (s skewed) Now() time.Time { return s.RealClock.Now().Add(s.by) }

// TestClocks that are wrong, by hours and either way, do no harm: neither to a checkpoint nor to the next, by an agent whose clock was put back.
func TestClocks(t *testing.T) {
	r := newRig(t)
	r.claim("claim")
	_, vmi := r.machine("vm", false)
	for i, by := range []time.Duration{5 * time.Hour, -5 * time.Hour} {
		g := &gate{before: make(chan struct{}), reached: make(chan string, 8)}
		stop := r.agent(node, func(o *agent.Options) { o.Engine, o.Clock = g, skewed{by: by} })
		c := r.checkpoint(fmt.Sprintf("skewed-%d", i), vmi, nil)
		<-g.reached
		stop()
		stop = r.agent(node, func(o *agent.Options) { o.Clock = skewed{by: min(by, 0)} })
		r.ready(c, vmckptv1.ReasonCaptured)
		stop()
	}
}

// TestComesLater shows that what is missing is waited for.
func TestComesLater(t *testing.T) {
	r := newRig(t)
	_, vmi := r.machine("vm", false)
	r.keys("two", map[string]string{"two": keyText(2)})
	r.agent(node, nil)
	c := r.checkpoint("patient", vmi, nil)
	wait(r, c, "another attempt", func(c *vmckptv1.VMCheckpoint) bool { return c.Status.Attempts > 1 })
	r.claim("claim")
	r.ready(c, vmckptv1.ReasonCaptured)
}

// TestKeys are rotated: old images are read by the old key, new ones written by the new, and a repository is taken along with its key.
func TestKeys(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	r.agent(node, nil)
	old := r.checkpoint("old", vmi, nil)
	r.ready(old, vmckptv1.ReasonCaptured)
	r.keys("two", map[string]string{"one": keyText(1), "two": keyText(2) + "encryption" + strings.TrimPrefix(keyText(3), "secret")})
	young := r.checkpoint("young", vmi, nil)
	r.ready(young, vmckptv1.ReasonCaptured)
	if i := young.Status.Image; i.Kind != vmckptv1.ImageBase || !i.Encrypted || old.Status.Image.Encrypted {
		t.Errorf("after the keys were changed: %+v", i)
	}
	youngest := r.checkpoint("youngest", vmi, nil)
	r.ready(youngest, vmckptv1.ReasonCaptured)
	if got := youngest.Status.Image.Parent; got != "young" {
		t.Errorf("parent %q", got)
	}
	for _, image := range []string{"old", "youngest"} {
		back := r.restore("back-to-"+image, image, vmi, func(o *vmckptv1.VMRestore) { o.Spec.Target.Mode = vmckptv1.RestoreInPlace })
		wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
		if !back.Ready() {
			t.Errorf("restore of %s: %s", image, message(back.Status.Conditions))
		}
		goesOn(t, m)
	}

	// Another cluster: another namespace and other keys; with the old one among them the image is known again.
	there := newRig(t)
	there.claimOf("claim", volume)
	there.keys("mine", map[string]string{"mine": keyText(9)})
	there.agent("node-there", func(o *agent.Options) { o.OtherNamespaces = true })
	arrive := func(name string) *vmckptv1.VMCheckpoint {
		return there.checkpointOn("node-there", name, nil, func(c *vmckptv1.VMCheckpoint) {
			c.Spec.Import, c.Spec.DeletionPolicy = &vmckptv1.Import{Image: "youngest"}, vmckptv1.DeletionRetain
		})
	}
	without := arrive("without")
	wait(there, without, "the import without its key", done)
	if got := message(without.Status.Conditions); without.Ready() || !strings.HasPrefix(got, "WrongKey: ") {
		t.Errorf("imported without its key: %s", got)
	}
	there.keys("mine", map[string]string{"mine": keyText(9), "theirs": keyText(2) + "encryption" + strings.TrimPrefix(keyText(3), "secret")})
	with := arrive("with")
	there.ready(with, vmckptv1.ReasonAdopted)
	if with.Status.Image.Digest != youngest.Status.Image.Digest {
		t.Errorf("imported: %+v", with.Status.Image)
	}
}
