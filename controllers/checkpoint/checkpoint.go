package checkpoint

import (
	"context"
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/claim"
	"github.com/vmckpt/vmckpt/controllers/node"
	"github.com/vmckpt/vmckpt/controllers/turn"
	"github.com/vmckpt/vmckpt/controllers/verdict"
	"github.com/vmckpt/vmckpt/controllers/vm"
	"github.com/vmckpt/vmckpt/controllers/wake"
)

// Reconciler binds checkpoints to nodes.
type Reconciler struct {
	Client client.Client
	Live   client.Reader // past the cache
	Events events.EventRecorder
	Clock  clock.Clock

	// Waits observes how long checkpoints waited to be bound, in seconds; nil where nobody wants to know.
	Waits prometheus.Observer
}

// Indexes by which checkpoints are found for what changed.
const (
	byMachine = "spec.source.name"
	byClaim   = "spec.storage.claimName"
	byNode    = "node"
)

// SetupWithManager adds the reconciler to a manager.
func (r *Reconciler) SetupWithManager(ctx context.Context, m ctrl.Manager) error {
	for field, keys := range map[string]func(*vmckptv1.VMCheckpoint) []string{
		byMachine: unbound(func(c *vmckptv1.VMCheckpoint) string { return c.Spec.Source.Name }),
		byClaim:   unbound(func(c *vmckptv1.VMCheckpoint) string { return c.Spec.Storage.ClaimName }),
		byNode:    nodes,
	} {
		err := m.GetFieldIndexer().IndexField(ctx, &vmckptv1.VMCheckpoint{}, field, func(o client.Object) []string { return keys(o.(*vmckptv1.VMCheckpoint)) })
		if err != nil {
			return fmt.Errorf("index checkpoints by %s: %w", field, err)
		}
	}
	ofName := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return r.waiting(ctx, o.GetNamespace(), byMachine, o.GetName())
	})
	b := ctrl.NewControllerManagedBy(m).Named("checkpoint").For(&vmckptv1.VMCheckpoint{}).
		Watches(&kubevirtv1.VirtualMachine{}, ofName).
		Watches(&kubevirtv1.VirtualMachineInstance{}, ofName).
		Watches(&vmckptv1.VMRestore{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.waiting(ctx, o.GetNamespace(), byMachine, o.(*vmckptv1.VMRestore).Spec.Target.Name)
		}))
	ofClaim := func(ctx context.Context, namespace, name string) []reconcile.Request {
		return r.waiting(ctx, namespace, byClaim, name)
	}
	ofNode := func(ctx context.Context, name string) []reconcile.Request {
		return r.waiting(ctx, metav1.NamespaceAll, byNode, name)
	}
	return wake.On(b, ofClaim, ofNode).WithOptions(controller.Options{MaxConcurrentReconciles: 4}).Complete(r)
}

// unbound indexes the checkpoints that wait to be bound. Nothing wakes the others.
func unbound(key func(*vmckptv1.VMCheckpoint) string) func(*vmckptv1.VMCheckpoint) []string {
	return func(c *vmckptv1.VMCheckpoint) []string {
		if c.Done() || c.Status.NodeName != "" {
			return nil
		}
		return []string{key(c)}
	}
}

// nodes are those whose changes a checkpoint has to know of: the one that has it and has not done with it, and any at all where it waits for one.
func nodes(c *vmckptv1.VMCheckpoint) []string {
	ready := meta.FindStatusCondition(c.Status.Conditions, vmckptv1.ConditionReady)
	switch {
	case c.DeletionTimestamp != nil && c.Status.NodeName != "":
		return []string{c.Status.NodeName, wake.AnyNode}
	case c.Done():
		return nil
	case c.Status.NodeName != "":
		return []string{c.Status.NodeName}
	case ready != nil && (ready.Reason == vmckptv1.ReasonNode || ready.Reason == vmckptv1.ReasonClaim):
		return []string{wake.AnyNode}
	}
	return nil
}

// waiting lists the checkpoints of a namespace that wait for what a field names.
func (r *Reconciler) waiting(ctx context.Context, namespace, field, value string) []reconcile.Request {
	var list vmckptv1.VMCheckpointList
	if err := r.Client.List(ctx, &list, client.InNamespace(namespace), client.MatchingFields{field: value}); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "list the checkpoints that wait", "namespace", namespace, "for", value)
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

// Reconcile brings a checkpoint one step on.
func (r *Reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	return verdict.Again(r.step(ctx, request.NamespacedName))
}

func (r *Reconciler) step(ctx context.Context, name types.NamespacedName) error {
	c := &vmckptv1.VMCheckpoint{}
	if err := r.Client.Get(ctx, name, c); err != nil {
		return client.IgnoreNotFound(err)
	}
	if c.DeletionTimestamp != nil {
		return r.deleted(ctx, c)
	}
	if c.Done() {
		return nil
	}
	if c.Status.NodeName != "" {
		if free, err := r.bound(ctx, c); err != nil || !free {
			return err
		}
	}
	nodeName, vmi, v, err := r.place(ctx, c)
	if err != nil {
		return err
	}
	if v != nil {
		return r.say(ctx, c, v)
	}
	// By a patch: an update would write the timeout in Go's spelling (10m0s for 10m), and take the field from whoever applied it.
	asRead := c.DeepCopy()
	if controllerutil.AddFinalizer(c, vmckptv1.Finalizer) {
		err := r.Client.Patch(ctx, c, client.MergeFromWithOptions(asRead, client.MergeFromWithOptimisticLock{}))
		return client.IgnoreNotFound(err) // which brings it here again
	}
	return r.bind(ctx, c, nodeName, vmi)
}

// bound looks after a checkpoint that is its agent's: a node that is not ready is waited for, and one that is gone has no agent any more. What that
// one had begun has failed; what it had not is free to be bound anew.
func (r *Reconciler) bound(ctx context.Context, c *vmckptv1.VMCheckpoint) (free bool, err error) {
	_, state, err := node.Look(ctx, r.Client, r.Live, c.Status.NodeName)
	switch {
	case err != nil:
		return false, err
	case state != node.StateGone:
		known := meta.FindStatusCondition(c.Status.Conditions, vmckptv1.ConditionReady)
		if known == nil {
			return false, nil
		}
		return false, r.say(ctx, c, verdict.Wait(known.Reason, node.Words(known.Message, c.Status.NodeName, state)))
	case c.Status.StartTime != nil:
		return false, r.say(ctx, c, verdict.Refuse(vmckptv1.ReasonNodeGone, fmt.Sprintf("node %s is gone, whose agent had begun with it: nobody can bring it to its end", c.Status.NodeName)))
	}
	c.Status.NodeName, c.Status.VMIName, c.Status.VMIUID = "", "", ""
	return true, nil
}

// place finds the node for a checkpoint, and the instance that it is of, or what stands against it.
func (r *Reconciler) place(ctx context.Context, c *vmckptv1.VMCheckpoint) (nodeName string, vmi *kubevirtv1.VirtualMachineInstance, v *verdict.Verdict, err error) {
	if c.Spec.Import != nil {
		nodeName, v, err = r.nodeOfClaim(ctx, c)
		return nodeName, nil, v, err
	}
	if vmi, v, err = vm.Running(ctx, r.Client, c.Namespace, c.Spec.Source); v != nil || err != nil {
		if v != nil {
			v.Message += "; the checkpoint is taken when it runs and stays on its node, and nothing is captured until then"
		}
		return "", nil, v, err
	}
	if v := vm.Capturable(vmi); v != nil {
		return "", nil, v, nil
	}
	if v, err = r.restoreFirst(ctx, c, vmi); v != nil || err != nil {
		return "", nil, v, err
	}
	n, v, err := node.OfMachine(ctx, r.Client, vmi.Status.NodeName)
	if v != nil || err != nil {
		return "", nil, v, err
	}
	name := claimOf(c)
	pv, v, err := claim.Usable(ctx, r.Client, name)
	if v != nil || err != nil {
		return "", nil, v, err
	}
	if v, err = claim.OnNode(name, pv, n); v != nil || err != nil {
		return "", nil, v, err
	}
	return n.Name, vmi, nil, nil
}

func claimOf(c *vmckptv1.VMCheckpoint) types.NamespacedName {
	return types.NamespacedName{Namespace: c.Namespace, Name: c.Spec.Storage.ClaimName}
}

// nodeOfClaim finds a node for what needs the claim and no machine.
func (r *Reconciler) nodeOfClaim(ctx context.Context, c *vmckptv1.VMCheckpoint) (string, *verdict.Verdict, error) {
	pv, v, err := claim.Usable(ctx, r.Client, claimOf(c))
	if v != nil || err != nil {
		return "", v, err
	}
	return claim.AnyNode(ctx, r.Client, claimOf(c), pv, c.Status.NodeName)
}

// restoreFirst lets a restore of the same machine go first, whichever was made first: what it will overwrite is not worth a checkpoint. Nor is what
// one has left half overwritten. One that cannot be done now does not keep the machine from being captured.
func (r *Reconciler) restoreFirst(ctx context.Context, c *vmckptv1.VMCheckpoint, vmi *kubevirtv1.VirtualMachineInstance) (*verdict.Verdict, error) {
	var list vmckptv1.VMRestoreList
	if err := r.Client.List(ctx, &list, client.InNamespace(c.Namespace)); err != nil {
		return nil, fmt.Errorf("list the restores: %w", err)
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.Done() || o.DeletionTimestamp != nil || o.Spec.Target.Name != vmi.Name {
			continue
		}
		// One that waits for a checkpoint, this very one perhaps, does not come before it; nor does one for a machine that stands paused, as long
		// as this one runs.
		if o.Status.NodeName == "" && (o.Status.Image == nil || o.Spec.Target.Mode == vmckptv1.RestorePaused && !vm.Paused(vmi)) {
			continue
		}
		if turn.Waits(o) || turn.Retries(o) {
			continue
		}
		return verdict.Wait(vmckptv1.ReasonRestoring, fmt.Sprintf("restore %s of virtual machine %s comes first", o.Name, vmi.Name)), nil
	}
	if o := torn(list.Items, vmi.UID); o != nil {
		return verdict.Wait(vmckptv1.ReasonMemoryInvalid, fmt.Sprintf("restore %s left the memory of virtual machine %s half overwritten: another restore makes it whole, or start it anew", o.Name, vmi.Name)), nil
	}
	return nil, nil
}

// torn returns the restore that left an instance with half its memory overwritten, if none has made it whole since.
func torn(restores []vmckptv1.VMRestore, instance types.UID) *vmckptv1.VMRestore {
	var last *vmckptv1.VMRestore
	var lastWhole, lastTorn metav1.Time
	for i := range restores {
		o := &restores[i]
		said := meta.FindStatusCondition(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
		switch {
		case said == nil || o.Status.VMIUID != instance:
		case said.Status != metav1.ConditionTrue:
			if lastWhole.Before(&said.LastTransitionTime) {
				lastWhole = said.LastTransitionTime
			}
		case last == nil || lastTorn.Before(&said.LastTransitionTime):
			last, lastTorn = o, said.LastTransitionTime
		}
	}
	if last == nil || !lastWhole.Before(&lastTorn) {
		return nil
	}
	return last
}

// say puts a verdict into the conditions, if it is news.
func (r *Reconciler) say(ctx context.Context, c *vmckptv1.VMCheckpoint, v *verdict.Verdict) error {
	now, kind := r.Clock.Now(), corev1.EventTypeNormal
	if v.Final {
		c.Failed(v.Reason, v.Message, now)
		kind = corev1.EventTypeWarning
	} else {
		if known := meta.FindStatusCondition(c.Status.Conditions, vmckptv1.ConditionReady); known != nil && known.Reason == v.Reason &&
			known.Message == v.Message && c.Status.ObservedGeneration == c.Generation {
			return nil
		}
		c.Waiting(v.Reason, v.Message, now)
	}
	if err := r.Client.Status().Update(ctx, c); err != nil {
		return client.IgnoreNotFound(err)
	}
	r.Events.Eventf(c, nil, kind, v.Reason, "Bind", "%s", verdict.Note(v.Message))
	return nil
}

// bind gives the checkpoint to a node's agent.
func (r *Reconciler) bind(ctx context.Context, c *vmckptv1.VMCheckpoint, nodeName string, vmi *kubevirtv1.VirtualMachineInstance) error {
	c.Status.NodeName, c.Status.StartTime = nodeName, nil
	if vmi != nil {
		c.Status.VMIName, c.Status.VMIUID = vmi.Name, vmi.UID
	}
	first := c.Status.Attempts == 0
	message := fmt.Sprintf("bound to node %s, whose agent has not taken it yet", nodeName)
	c.Waiting(vmckptv1.ReasonBound, message, r.Clock.Now())
	if err := r.Client.Status().Update(ctx, c); err != nil {
		return client.IgnoreNotFound(err)
	}
	r.Events.Eventf(c, nil, corev1.EventTypeNormal, vmckptv1.ReasonBound, "Bind", "bound to node %s", nodeName)
	if first && r.Waits != nil {
		r.Waits.Observe(max(0, r.Clock.Since(c.CreationTimestamp.Time).Seconds()))
	}
	return nil
}

// deleted takes the finalizer off where no agent has to do anything, or none can.
func (r *Reconciler) deleted(ctx context.Context, c *vmckptv1.VMCheckpoint) error {
	if !controllerutil.ContainsFinalizer(c, vmckptv1.Finalizer) {
		return nil
	}
	if c.Status.NodeName != "" && !untouched(c) && (c.Spec.DeletionPolicy != vmckptv1.DeletionRetain || !c.Done()) {
		if free, err := r.orphaned(ctx, c); err != nil || !free {
			return err
		}
	}
	before := c.DeepCopy()
	controllerutil.RemoveFinalizer(c, vmckptv1.Finalizer)
	return client.IgnoreNotFound(r.Client.Patch(ctx, c, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}

// untouched reports whether no agent has begun with a checkpoint. Nor will one, once it is deleted: agents ask the API server before they begin.
func untouched(c *vmckptv1.VMCheckpoint) bool {
	return !c.Done() && c.Status.StartTime == nil && c.Status.Attempts == 0 && c.Status.Image == nil
}

// nodeAway begins what is said where the node of a deleted checkpoint is not ready.
const nodeAway = "node %s is not ready"

// orphaned looks after a checkpoint whose image its agent is to remove. Where the node is gone another one's does, if there is one that reaches the
// volume; else the image is left, and the object is free to go.
func (r *Reconciler) orphaned(ctx context.Context, c *vmckptv1.VMCheckpoint) (free bool, err error) {
	lost := c.Status.NodeName
	_, state, err := node.Look(ctx, r.Client, r.Live, lost)
	switch {
	case err != nil:
		return false, err
	case state == node.StateReady:
		// What the agent says itself of the removal stands.
		away := fmt.Sprintf(nodeAway, lost)
		if known := meta.FindStatusCondition(c.Status.Conditions, vmckptv1.ConditionReady); known != nil &&
			known.Reason == vmckptv1.ReasonDeleting && !strings.HasPrefix(known.Message, away) {
			return false, nil
		}
		if err := verdict.AgentsTurn(c.DeletionTimestamp.Time, r.Clock.Now()); err != nil {
			return false, err
		}
		does := "removes the image"
		if c.Spec.DeletionPolicy == vmckptv1.DeletionRetain {
			does = "ends its work on it"
		}
		return false, r.say(ctx, c, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf(
			"the agent of node %s %s; if it does not run there, take the finalizer %s off to let the object go without", lost, does, vmckptv1.Finalizer)))
	case state == node.StateNotReady:
		return false, r.say(ctx, c, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf(
			nodeAway+": its agent removes the image when it is again. To let the object go without, take the finalizer %s off", lost, vmckptv1.Finalizer)))
	}
	other, v, err := r.nodeOfClaim(ctx, c)
	switch {
	case err != nil:
		return false, err
	case v == nil:
		c.Status.NodeName = other
		return false, r.say(ctx, c, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf("node %s is gone: the agent of node %s removes the image", lost, other)))
	case v.Reason == vmckptv1.ReasonNode:
		return false, r.say(ctx, c, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf("node %s is gone, and another one is waited for to remove the image: %s", lost, v.Message)))
	}
	r.Events.Eventf(c, nil, corev1.EventTypeWarning, vmckptv1.ReasonNodeGone, "Delete", "%s",
		verdict.Note(fmt.Sprintf("node %s is gone, and no other can remove the image: what there is of it stays on the volume (%s)", lost, v.Message)))
	return true, nil
}
