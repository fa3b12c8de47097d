package operator

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/test/machine"
)

// TestStory is the main way, with the rights that the manifests give and no others: keys made, a base, an increment, the machine killed, another
// restored; what is told in metrics, events and probes; and an end in order.
func TestStory(t *testing.T) {
	r := newRig(t)
	volume := t.TempDir()
	r.claim(volume)
	manager, agent := r.manager(), r.agent()
	m := r.machine(64*machine.MiB, false)
	base := r.checkpoint("base")
	wait(r, base, "the machine to be missed", func(c *vmckptv1.VMCheckpoint) bool {
		return strings.HasPrefix(message(c.Status.Conditions), vmckptv1.ReasonWaitingForVM)
	})
	r.instance(false)
	r.ready(base, vmckptv1.ReasonCaptured)
	increment := r.checkpoint("increment")
	r.ready(increment, vmckptv1.ReasonCaptured)
	if increment.Status.Image.Parent != "base" {
		t.Errorf("%+v", increment.Status.Image)
	}
	at, _, err := m.WriterStatus(t.Context())
	r.must(err)
	r.must(m.Kill())
	r.noInstance()
	m = r.machine(64*machine.MiB, true)
	r.instance(true)
	back := r.restore("back", "increment", vmckptv1.RestorePaused)
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() {
		t.Fatal(message(back.Status.Conditions))
	}
	goesOn(t, m, at.Passes)

	for want, text := range map[string]string{
		`vmckpt_capture_pause_seconds_bucket{for="instant",le="0.001"}`: agent.get(agent.metrics, "/metrics"),
		`vmckpt_captures_total{kind="increment",result="ok"} 1`:         agent.get(agent.metrics, "/metrics"),
		`vmckpt_restores_total{result="ok"} 1`:                          agent.get(agent.metrics, "/metrics"),
		`vmckpt_queue_running 0`:                                        agent.get(agent.metrics, "/metrics"),
		`vmckpt_checkpoints{phase="Ready"}`:                             manager.get(manager.metrics, "/metrics"),
		"vmckpt_checkpoint_wait_seconds_count 2":                        manager.get(manager.metrics, "/metrics"),
		`vmckpt_restores{phase="Restored"}`:                             manager.get(manager.metrics, "/metrics"),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s among the metrics:\n%s", want, text)
		}
	}
	for _, p := range []*program{manager, agent} {
		p.get(p.probes, "/healthz")
		p.get(p.probes, "/readyz")
	}
	events := r.server.Kubectl(t, "get", "events", "--namespace", r.namespace, "--output", "jsonpath={.items[*].message}")
	for _, want := range []string{"bound to node " + node, "captured in ", "restored from image increment in ", "nothing is captured until then"} {
		if !strings.Contains(events, want) {
			t.Errorf("no event says %q: %s", want, events)
		}
	}
	// Logs say nothing of rights that are missing.
	agent.end()
	manager.end()
	for _, p := range []*program{manager, agent} {
		text, err := os.ReadFile(p.log)
		r.must(err)
		if strings.Contains(string(text), "forbidden") {
			t.Errorf("%s misses rights:\n%s", p.cmd.Path, text)
		}
	}
}

// TestKilled kills manager and agent with -9 in every phase of a checkpoint, and at random moments of a capture and of a restore: the guest goes
// on, and the next ones bring it to its end.
func TestKilled(t *testing.T) {
	r := newRig(t)
	volume := t.TempDir()
	r.claim(volume)
	m := r.machine(256*machine.MiB, false)
	var manager, agent *program
	up := func() {
		if manager == nil {
			manager = r.manager()
		}
		if agent == nil {
			agent = r.agent()
		}
	}
	down := func(p **program) {
		if *p != nil {
			(*p).kill()
			*p = nil
		}
	}
	inPhase := func(phases ...vmckptv1.CheckpointPhase) func(*vmckptv1.VMCheckpoint) bool {
		return func(c *vmckptv1.VMCheckpoint) bool { return slices.Contains(phases, c.Status.Phase) || c.Done() }
	}
	for _, victim := range []struct {
		name string
		who  **program
	}{{"manager", &manager}, {"agent", &agent}} {
		up()
		c := r.checkpoint("pending-" + victim.name)
		wait(r, c, "pending", inPhase(vmckptv1.CheckpointPending))
		down(victim.who)
		r.instance(false)
		up()
		r.ready(c, vmckptv1.ReasonCaptured)
		r.noInstance()
	}
	r.instance(false)
	down(&agent)
	bound := r.checkpoint("bound")
	wait(r, bound, "bound", inPhase(vmckptv1.CheckpointBound))
	down(&manager)
	up()
	r.ready(bound, vmckptv1.ReasonCaptured)
	for _, name := range []string{"running-a", "running-b", "running-c"} {
		c := r.checkpoint(name)
		wait(r, c, "running", inPhase(vmckptv1.CheckpointRunning))
		time.Sleep(time.Duration(rand.Int64N(int64(400 * time.Millisecond))))
		down(&agent)
		down(&manager)
		goesOn(t, m, 0)
		up()
		r.ready(c, vmckptv1.ReasonCaptured)
		t.Logf("%s: %d attempts", name, c.Status.Attempts)
	}
	for _, name := range []string{"restoring-a", "restoring-b", "restoring-c"} {
		o := r.restore(name, "running-b", vmckptv1.RestoreInPlace)
		wait(r, o, "running", func(o *vmckptv1.VMRestore) bool { return o.Status.Phase == vmckptv1.RestoreRunning || o.Done() })
		time.Sleep(time.Duration(rand.Int64N(int64(400 * time.Millisecond))))
		down(&agent)
		up()
		wait(r, o, "restored", (*vmckptv1.VMRestore).Done)
		if !o.Ready() {
			t.Fatal(message(o.Status.Conditions))
		}
		t.Logf("%s: %d attempts", name, o.Status.Attempts)
		goesOn(t, m, 0)
	}
	// In the middle of overwriting memory: that is said as long as there is nobody who knows better.
	invalid := func(o *vmckptv1.VMRestore) bool {
		return meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
	}
	for i, caught := 0, false; !caught; i++ {
		if i == 5 {
			t.Fatal("no restore was seen to overwrite memory")
		}
		torn := r.restore(fmt.Sprintf("torn-%d", i), "running-b", vmckptv1.RestoreInPlace)
		wait(r, torn, "the mark", func(o *vmckptv1.VMRestore) bool { return invalid(o) || o.Done() })
		down(&agent)
		wait(r, torn, "the object as the agent left it", func(*vmckptv1.VMRestore) bool { return true })
		caught = invalid(torn)
		if !caught && !torn.Done() {
			t.Errorf("killed in the middle: %s", message(torn.Status.Conditions))
		}
		up()
		wait(r, torn, "restored", (*vmckptv1.VMRestore).Done)
		if !torn.Ready() || invalid(torn) {
			t.Fatal(message(torn.Status.Conditions))
		}
		goesOn(t, m, 0)
	}
	// Deleted while nobody is there.
	down(&agent)
	down(&manager)
	r.must(r.Delete(t.Context(), bound))
	up()
	for until := time.Now().Add(90 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err := r.Get(t.Context(), client.ObjectKeyFromObject(bound), bound); client.IgnoreNotFound(err) == nil && err != nil {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("it is still there: %+v", bound)
		}
	}
	if _, err := os.Stat(filepath.Join(volume, "vmckpt/images/bound")); !os.IsNotExist(err) {
		t.Errorf("the image of what was deleted: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(volume, "vmckpt/tmp")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestEmptyCluster loses etcd, and applies the same manifests again: nothing is captured, and the machine is restored from what the claim has.
func TestEmptyCluster(t *testing.T) {
	r := newRig(t)
	volume := t.TempDir()
	r.claim(volume)
	manager, agent := r.manager(), r.agent()
	m := r.machine(64*machine.MiB, false)
	r.instance(false)
	for _, name := range []string{"first", "second"} {
		r.ready(r.checkpoint(name), vmckptv1.ReasonCaptured)
	}
	at, _, err := m.WriterStatus(t.Context())
	r.must(err)
	keys := &corev1.Secret{}
	r.must(r.Get(t.Context(), client.ObjectKey{Namespace: system, Name: "vmckpt-keys"}, keys))
	r.must(m.Kill())
	agent.kill()
	manager.kill()
	r.server.WipeEtcd(t)

	r.install()
	r.must(r.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: r.namespace}}))
	r.must(r.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: system, Name: "vmckpt-keys"}, Data: keys.Data}))
	r.manager()
	r.agent()
	first, second := r.checkpoint("first"), r.checkpoint("second")
	back := r.restore("back", "second", vmckptv1.RestorePaused)
	r.claim(volume)
	wait(r, first, "waiting", func(c *vmckptv1.VMCheckpoint) bool {
		return strings.HasPrefix(message(c.Status.Conditions), vmckptv1.ReasonWaitingForVM)
	})
	m = r.machine(64*machine.MiB, true)
	r.instance(true)
	r.ready(second, vmckptv1.ReasonAdopted)
	wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
	if !back.Ready() {
		t.Fatal(message(back.Status.Conditions))
	}
	r.ready(first, vmckptv1.ReasonAdopted)
	goesOn(t, m, at.Passes)
	list, err := os.ReadDir(filepath.Join(volume, "vmckpt/images"))
	if err != nil || len(list) != 2 {
		t.Errorf("images: %v, %v", list, err)
	}
}

// TestOneAgentANode: a second one is started for a node by a name that is taken: two at once would work on one machine, so it waits for the other to end.
func TestOneAgentANode(t *testing.T) {
	r := newRig(t)
	r.claim(t.TempDir())
	r.manager()
	// The node is the first's who takes it: the second is started only then.
	first := r.agent()
	first.get(first.probes, "/readyz")
	second := r.agent()
	m := r.machine(64*machine.MiB, false)
	r.instance(false)
	r.ready(r.checkpoint("by-the-first"), vmckptv1.ReasonCaptured)
	if text, err := os.ReadFile(second.log); err != nil || strings.Contains(string(text), "the node agent begins") {
		t.Fatalf("the second has begun: %s, %v", text, err)
	}
	// It is alive, and says what it waits for.
	second.get(second.probes, "/healthz")
	response, err := http.Get("http://" + second.probes + "/readyz")
	r.must(err)
	defer response.Body.Close()
	if text, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(text), "another agent is at work") {
		t.Errorf("readyz of the second: %s: %s (%v)", response.Status, text, err)
	}
	first.end()
	second.get(second.probes, "/readyz")
	r.ready(r.checkpoint("by-the-second"), vmckptv1.ReasonCaptured)
	goesOn(t, m, 0)
	second.end()
}

// TestReadiness is that of what has read the cluster, and of two managers one tells the totals.
func TestReadiness(t *testing.T) {
	r := newRig(t)
	r.claim(t.TempDir())
	c := r.checkpoint("first")
	// Without the right to read them, as it is while the manifests are being applied.
	rights := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "vmckpt-manager"}}
	r.must(r.Get(t.Context(), client.ObjectKeyFromObject(rights), rights))
	r.must(r.Delete(t.Context(), rights))
	first := r.manager()
	first.get(first.probes, "/healthz")
	if response, err := http.Get("http://" + first.probes + "/readyz"); err != nil {
		t.Error(err)
	} else if response.Body.Close(); response.StatusCode == http.StatusOK {
		t.Error("a manager that could read nothing is ready")
	}
	rights.ResourceVersion, rights.UID = "", ""
	r.must(r.Create(t.Context(), rights))
	first.get(first.probes, "/readyz")
	second := r.manager()
	second.get(second.probes, "/readyz")
	wait(r, c, "a word", func(c *vmckptv1.VMCheckpoint) bool { return len(c.Status.Conditions) != 0 })

	tells := func(p *program) bool {
		return strings.Contains(p.get(p.metrics, "/metrics"), `vmckpt_checkpoints{phase="Pending"}`)
	}
	one := func() bool { return tells(first) != tells(second) }
	for until := time.Now().Add(bound); !one(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("the totals are told by the first: %v, by the second: %v", tells(first), tells(second))
		}
	}
	leader, other := first, second
	if tells(second) {
		leader, other = second, first
	}
	leader.end()
	for until := time.Now().Add(bound); !tells(other); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("nobody tells the totals")
		}
	}
	other.end()
}
