package checkpoint_test

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// begun is an agent's beginning with a checkpoint.
func begun(c *vmckptv1.VMCheckpoint) {
	c.Status.StartTime, c.Status.Attempts = &metav1.Time{Time: time.Now()}, 1
	c.Waiting(vmckptv1.ReasonRunning, "is being captured", time.Now())
}

// TestNodeGone ends what its agent had begun, takes back what it had not, and lets go of what is deleted.
func TestNodeGone(t *testing.T) {
	r := newRig(t)
	stop := r.controllers(false)
	n := r.node("lost")
	r.claim("claim", "")
	r.claim("both", n.Name+",node-b")
	for _, name := range []string{"vm", "back", "back-idle"} {
		r.instance(name, func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = n.Name })
	}
	mine := map[string]*vmckptv1.VMCheckpoint{}
	for _, name := range []string{"idle", "running", "deleted", "ready", "ready-both"} {
		mine[name] = r.checkpoint(name, func(c *vmckptv1.VMCheckpoint) {
			if name == "ready-both" {
				c.Spec.Storage.ClaimName = "both"
			}
		})
		r.says(mine[name], vmckptv1.ReasonBound, "")
		switch name {
		case "running", "deleted":
			r.agent(mine[name], begun)
		case "ready", "ready-both":
			r.agent(mine[name], captured)
		}
	}
	restores := map[string]*vmckptv1.VMRestore{}
	for _, name := range []string{"back", "back-idle"} {
		restores[name] = r.restore(name, "", func(o *vmckptv1.VMRestore) {
			o.Spec.Source.Volume, o.Spec.Target.Name = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}, name
		})
		r.says(restores[name], vmckptv1.ReasonBound, "")
	}
	o := restores["back"]
	o.Status.StartTime = &metav1.Time{Time: time.Now()}
	o.Waiting(vmckptv1.ReasonRunning, "is being restored", time.Now())
	r.must(r.Status().Update(t.Context(), o))
	r.must(r.Delete(t.Context(), mine["deleted"]))

	r.must(r.Delete(t.Context(), n))
	r.says(mine["running"], vmckptv1.ReasonNodeGone, "node "+n.Name+" is gone")
	r.says(o, vmckptv1.ReasonNodeGone, "node "+n.Name+" is gone")
	if !mine["running"].Done() || !o.Done() {
		t.Errorf("%+v, %+v", mine["running"].Status, o.Status)
	}
	r.gone(mine["deleted"])
	r.event(mine["deleted"], corev1.EventTypeWarning, "stays on the volume")
	r.says(mine["idle"], vmckptv1.ReasonNode, "node "+n.Name+", where the virtual machine was, is gone")
	r.says(restores["back-idle"], vmckptv1.ReasonNode, "is gone")
	if mine["idle"].Status.NodeName != "" || restores["back-idle"].Status.NodeName != "" {
		t.Errorf("%+v, %+v", mine["idle"].Status, restores["back-idle"].Status)
	}
	for _, name := range []string{"vm", "back-idle"} {
		r.instance(name, func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = "node-a" })
	}
	r.says(mine["idle"], vmckptv1.ReasonBound, "bound to node node-a")
	r.says(restores["back-idle"], vmckptv1.ReasonBound, "bound to node node-a")

	// What is deleted while the controllers are away is seen to afterwards.
	stop()
	for _, name := range []string{"ready", "ready-both"} {
		r.must(r.Delete(t.Context(), mine[name]))
	}
	r.controllers(false)
	r.gone(mine["ready"])
	r.event(mine["ready"], corev1.EventTypeWarning, "stays on the volume")
	r.says(mine["ready-both"], vmckptv1.ReasonDeleting, "the agent of node node-b removes the image")
	if c := mine["ready-both"]; c.Status.NodeName != "node-b" || len(c.Finalizers) != 1 {
		t.Errorf("%+v", c)
	}
}

// TestNodeNotReady is waited for, and said.
func TestNodeNotReady(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	n := r.node("away")
	r.answers(n, false)
	r.claim("claim", "")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = n.Name })
	r.instance("back", func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = n.Name })
	c := r.checkpoint("first", nil)
	o := r.restore("back", "", func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume, o.Spec.Target.Name = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}, "back"
	})
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonNode, "node "+n.Name+", where the virtual machine is, is not ready")
	}
	r.answers(n, true)
	r.says(c, vmckptv1.ReasonBound, "bound to node")
	r.says(o, vmckptv1.ReasonBound, "bound to node")
	r.agent(c, begun)
	r.answers(n, false)
	r.says(c, vmckptv1.ReasonRunning, "node "+n.Name+" is not ready, and is waited for: is being captured")
	r.says(o, vmckptv1.ReasonBound, "node "+n.Name+" is not ready, and is waited for: bound to node")
	if c.Done() || c.Status.Phase != vmckptv1.CheckpointRunning || c.Status.NodeName != n.Name {
		t.Errorf("%+v", c.Status)
	}
	r.answers(n, true)
	r.wait(c, "the node to be back", func() bool {
		return meta.FindStatusCondition(c.Status.Conditions, vmckptv1.ConditionReady).Message == "is being captured"
	})
	r.wait(o, "the node to be back", func() bool {
		return strings.HasPrefix(meta.FindStatusCondition(o.Status.Conditions, vmckptv1.ConditionReady).Message, "bound to node")
	})
	o.Status.StartTime, o.Status.Attempts = &metav1.Time{Time: time.Now()}, 1
	r.must(r.Status().Update(t.Context(), o))
	r.answers(n, false)
	for _, deleted := range []client.Object{c, o} {
		r.must(r.Delete(t.Context(), deleted))
		r.says(deleted, vmckptv1.ReasonDeleting, "node "+n.Name+" is not ready")
		if len(deleted.GetFinalizers()) != 1 {
			t.Errorf("%+v", deleted)
		}
	}
}

// TestImportOnNodes that are ready, of those that are known to have the volume.
func TestImportOnNodes(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.patience = 20 * time.Second // less than a look once a minute would take
	first, second := r.node("a"), r.node("b")
	r.answers(first, false)
	imports := func(claim string) func(*vmckptv1.VMCheckpoint) {
		return func(c *vmckptv1.VMCheckpoint) {
			c.Spec.Import, c.Spec.Storage.ClaimName = &vmckptv1.Import{Image: "old"}, claim
		}
	}
	r.claim("first", first.Name)
	waits := r.checkpoint("waits", imports("first"))
	r.says(waits, vmckptv1.ReasonNode, "no node that reaches the volume of claim "+r.namespace+"/first is ready ("+first.Name+")")
	r.claim("both", first.Name+","+second.Name)
	r.says(r.checkpoint("ready", imports("both")), vmckptv1.ReasonBound, "bound to node "+second.Name)
	r.answers(first, true)
	r.says(waits, vmckptv1.ReasonBound, "bound to node "+first.Name)
	first.Spec.Unschedulable = true
	r.must(r.Update(t.Context(), first))
	r.says(r.checkpoint("emptied", imports("first")), vmckptv1.ReasonBound, "bound to node "+first.Name)

	r.claim("anywhere", "")
	lost := r.checkpoint("anywhere", imports("anywhere"))
	r.says(lost, vmckptv1.ReasonClaim, "give it nodeAffinity for the node that has the images")
	pv := &corev1.PersistentVolume{}
	r.must(r.Get(t.Context(), client.ObjectKey{Name: r.namespace + "-anywhere"}, pv))
	pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: []string{second.Name}}},
	}}}}
	r.must(r.Update(t.Context(), pv))
	r.says(lost, vmckptv1.ReasonBound, "bound to node "+second.Name)
}
