package restore

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
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

// Reconciler binds restores to nodes.
type Reconciler struct {
	Client client.Client
	Live   client.Reader // past the cache
	Events events.EventRecorder
	Clock  clock.Clock
}

// Indexes by which restores are found for what changed.
const (
	byMachine    = "spec.target.name"
	byCheckpoint = "spec.source.checkpointName"
	byClaim      = "claim" // that of the image, once it is known
	byNode       = "node"
)

// SetupWithManager adds the reconciler to a manager.
func (r *Reconciler) SetupWithManager(ctx context.Context, m ctrl.Manager) error {
	for field, key := range map[string]func(*vmckptv1.VMRestore) string{
		byMachine:    unbound(func(o *vmckptv1.VMRestore) string { return o.Spec.Target.Name }),
		byCheckpoint: unbound(func(o *vmckptv1.VMRestore) string { return o.Spec.Source.CheckpointName }),
		byClaim: unbound(func(o *vmckptv1.VMRestore) string {
			if o.Status.Image == nil {
				return ""
			}
			return o.Status.Image.ClaimName
		}),
		byNode: nodeOf,
	} {
		err := m.GetFieldIndexer().IndexField(ctx, &vmckptv1.VMRestore{}, field, func(o client.Object) []string {
			if v := key(o.(*vmckptv1.VMRestore)); v != "" {
				return []string{v}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("index restores by %s: %w", field, err)
		}
	}
	waking := func(field string, value func(client.Object) string) handler.EventHandler {
		return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.waiting(ctx, o.GetNamespace(), field, value(o))
		})
	}
	b := ctrl.NewControllerManagedBy(m).Named("restore").For(&vmckptv1.VMRestore{}).
		Watches(&kubevirtv1.VirtualMachine{}, waking(byMachine, client.Object.GetName)).
		Watches(&kubevirtv1.VirtualMachineInstance{}, waking(byMachine, client.Object.GetName)).
		Watches(&vmckptv1.VMCheckpoint{}, waking(byCheckpoint, client.Object.GetName)).
		Watches(&vmckptv1.VMRestore{}, waking(byMachine, func(o client.Object) string { return o.(*vmckptv1.VMRestore).Spec.Target.Name }))
	ofClaim := func(ctx context.Context, namespace, name string) []reconcile.Request {
		return r.waiting(ctx, namespace, byClaim, name)
	}
	ofNode := func(ctx context.Context, name string) []reconcile.Request {
		return r.waiting(ctx, metav1.NamespaceAll, byNode, name)
	}
	// One at a time: two restores of a machine that are looked at in the same moment would both find the other unbound.
	return wake.On(b, ofClaim, ofNode).WithOptions(controller.Options{MaxConcurrentReconciles: 1}).Complete(r)
}

// unbound indexes the restores that wait to be bound. Nothing wakes the others.
func unbound(key func(*vmckptv1.VMRestore) string) func(*vmckptv1.VMRestore) string {
	return func(o *vmckptv1.VMRestore) string {
		if o.Done() || o.Status.NodeName != "" {
			return ""
		}
		return key(o)
	}
}

// nodeOf is the node whose changes a restore has to know of: the one that has it and has not done with it, or any where it waits for one.
func nodeOf(o *vmckptv1.VMRestore) string {
	ready := meta.FindStatusCondition(o.Status.Conditions, vmckptv1.ConditionReady)
	switch {
	case o.Done():
		return ""
	case o.Status.NodeName != "":
		return o.Status.NodeName
	case ready != nil && (ready.Reason == vmckptv1.ReasonNode || ready.Reason == vmckptv1.ReasonClaim):
		return wake.AnyNode
	}
	return ""
}

// waiting lists the restores of a namespace that wait for what a field names.
func (r *Reconciler) waiting(ctx context.Context, namespace, field, value string) []reconcile.Request {
	var list vmckptv1.VMRestoreList
	if err := r.Client.List(ctx, &list, client.InNamespace(namespace), client.MatchingFields{field: value}); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "list the restores that wait", "namespace", namespace, "for", value)
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

// Reconcile brings a restore one step on.
func (r *Reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	return verdict.Again(r.step(ctx, request.NamespacedName))
}

func (r *Reconciler) step(ctx context.Context, name types.NamespacedName) error {
	o := &vmckptv1.VMRestore{}
	if err := r.Client.Get(ctx, name, o); err != nil {
		return client.IgnoreNotFound(err)
	}
	if o.DeletionTimestamp != nil {
		return r.deleted(ctx, o)
	}
	if o.Done() {
		return nil
	}
	before := o.Status.DeepCopy()
	if o.Status.NodeName != "" {
		if free, err := r.bound(ctx, o, before); err != nil || !free {
			return err
		}
	}
	vmi, v, err := r.place(ctx, o)
	if err != nil {
		return err
	}
	if v != nil {
		return r.say(ctx, o, before, v)
	}
	// By a patch: an update would write the timeout in Go's spelling (10m0s for 10m), and take the field from whoever applied it.
	asRead := o.DeepCopy()
	if controllerutil.AddFinalizer(o, vmckptv1.Finalizer) {
		err := r.Client.Patch(ctx, o, client.MergeFromWithOptions(asRead, client.MergeFromWithOptimisticLock{}))
		return client.IgnoreNotFound(err) // which brings it here again
	}
	return r.bind(ctx, o, vmi)
}

// bound looks after a restore that is its agent's: a node that is not ready is waited for, and one that is gone has no agent any more. What that one
// had begun has failed; what it had not is free to be bound anew.
func (r *Reconciler) bound(ctx context.Context, o *vmckptv1.VMRestore, before *vmckptv1.VMRestoreStatus) (free bool, err error) {
	_, state, err := node.Look(ctx, r.Client, r.Live, o.Status.NodeName)
	switch {
	case err != nil:
		return false, err
	case state != node.StateGone:
		known := meta.FindStatusCondition(o.Status.Conditions, vmckptv1.ConditionReady)
		if known == nil {
			return false, nil
		}
		return false, r.say(ctx, o, before, verdict.Wait(known.Reason, node.Words(known.Message, o.Status.NodeName, state)))
	case o.Status.StartTime != nil:
		return false, r.say(ctx, o, before, verdict.Refuse(vmckptv1.ReasonNodeGone, fmt.Sprintf(
			"node %s is gone, whose agent had begun with it, and nobody can say how far it came: should the virtual machine still be there, restore it again or start it anew", o.Status.NodeName)))
	}
	o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID = "", "", ""
	return true, nil
}

// place finds the image and the instance for a restore, or what stands against it.
func (r *Reconciler) place(ctx context.Context, o *vmckptv1.VMRestore) (*kubevirtv1.VirtualMachineInstance, *verdict.Verdict, error) {
	if v, err := r.image(ctx, o); v != nil || err != nil {
		return nil, v, err
	}
	vmi, v, err := vm.Running(ctx, r.Client, o.Namespace, o.Spec.Target.VMReference)
	if v != nil || err != nil {
		return nil, v, err
	}
	if o.Spec.Target.Mode == vmckptv1.RestorePaused && !vm.Paused(vmi) {
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, fmt.Sprintf(
			"virtual machine %s/%s runs, and the restore is for one that stands paused: start it paused, or roll it back with mode InPlace", o.Namespace, vmi.Name)), nil
	}
	n, v, err := node.OfMachine(ctx, r.Client, vmi.Status.NodeName)
	if v != nil || err != nil {
		return nil, v, err
	}
	name := types.NamespacedName{Namespace: o.Namespace, Name: o.Status.Image.ClaimName}
	pv, v, err := claim.Usable(ctx, r.Client, name)
	if v != nil || err != nil {
		return nil, v, err
	}
	if v, err = claim.OnNode(name, pv, n); v != nil || err != nil {
		return nil, v, err
	}
	// Last: one that says it waits for its turn could begin if it had it, and others wait for it in turn.
	v, err = r.turn(ctx, o, vmi)
	return vmi, v, err
}

// image finds out what is to be restored.
func (r *Reconciler) image(ctx context.Context, o *vmckptv1.VMRestore) (*verdict.Verdict, error) {
	if v := o.Spec.Source.Volume; v != nil {
		o.Status.Image = v.DeepCopy()
		return nil, nil
	}
	name := types.NamespacedName{Namespace: o.Namespace, Name: o.Spec.Source.CheckpointName}
	c := &vmckptv1.VMCheckpoint{}
	if err := r.Client.Get(ctx, name, c); apierrors.IsNotFound(err) {
		return verdict.Wait(vmckptv1.ReasonWaiting, fmt.Sprintf("there is no checkpoint %s", name.Name)), nil
	} else if err != nil {
		return nil, fmt.Errorf("read checkpoint %v: %w", name, err)
	}
	switch {
	case c.DeletionTimestamp != nil:
		return verdict.Wait(vmckptv1.ReasonWaiting, fmt.Sprintf("checkpoint %s is being deleted", name.Name)), nil
	case c.Done() && !c.Ready():
		return verdict.Refuse("CheckpointFailed", fmt.Sprintf("checkpoint %s has failed, and cannot be restored", name.Name)), nil
	case !c.Ready() || c.Status.Image == nil:
		return verdict.Wait(vmckptv1.ReasonWaiting, fmt.Sprintf("checkpoint %s is not ready yet", name.Name)), nil
	}
	o.Status.Image = &vmckptv1.ImageRef{ClaimName: c.Spec.Storage.ClaimName, Image: c.Status.Image.Name}
	o.Status.Digest = c.Status.Image.Digest
	return nil, nil
}

// turn lets older restores of the same machine go first.
func (r *Reconciler) turn(ctx context.Context, o *vmckptv1.VMRestore, vmi *kubevirtv1.VirtualMachineInstance) (*verdict.Verdict, error) {
	var list vmckptv1.VMRestoreList
	if err := r.Client.List(ctx, &list, client.InNamespace(o.Namespace)); err != nil {
		return nil, fmt.Errorf("list the restores: %w", err)
	}
	for i := range list.Items {
		other := &list.Items[i]
		if other.UID == o.UID || other.Done() || other.Spec.Target.Name != o.Spec.Target.Name {
			continue
		}
		// The cache may not show yet that the other was bound a moment ago.
		if err := r.Live.Get(ctx, client.ObjectKeyFromObject(other), other); apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("read restore %s: %w", other.Name, err)
		}
		if other.Done() {
			continue
		}
		// What waits for a checkpoint or a claim that may never come, or for a machine that stands paused while it runs, is passed by; what nobody
		// has looked at yet is not. Of those that are bound only what waits for its repository is: one that is tried again soon would overwrite what
		// the younger one has restored.
		eligible := len(other.Status.Conditions) == 0 ||
			other.Status.Image != nil && !turn.Waits(other) && (other.Spec.Target.Mode != vmckptv1.RestorePaused || vm.Paused(vmi))
		bound := other.Status.NodeName != "" && !turn.Endless(other)
		if bound || other.Status.NodeName == "" && other.DeletionTimestamp == nil && older(other, o) && eligible {
			return verdict.Wait(vmckptv1.ReasonRestoring, fmt.Sprintf("restore %s of the same virtual machine comes first", other.Name)), nil
		}
	}
	return nil, nil
}

func older(a, b *vmckptv1.VMRestore) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.Name < b.Name
}

// say puts a verdict into the conditions, if it is news.
func (r *Reconciler) say(ctx context.Context, o *vmckptv1.VMRestore, before *vmckptv1.VMRestoreStatus, v *verdict.Verdict) error {
	now, kind := r.Clock.Now(), corev1.EventTypeNormal
	if v.Final {
		o.Failed(v.Reason, v.Message, now)
		kind = corev1.EventTypeWarning
	} else {
		known := meta.FindStatusCondition(before.Conditions, vmckptv1.ConditionReady)
		if known != nil && known.Reason == v.Reason && known.Message == v.Message && (before.Image == nil) == (o.Status.Image == nil) {
			return nil
		}
		o.Waiting(v.Reason, v.Message, now)
	}
	if err := r.Client.Status().Update(ctx, o); err != nil {
		return client.IgnoreNotFound(err)
	}
	r.Events.Eventf(o, nil, kind, v.Reason, "Bind", "%s", verdict.Note(v.Message))
	return nil
}

// bind gives the restore to the agent of the machine's node.
func (r *Reconciler) bind(ctx context.Context, o *vmckptv1.VMRestore, vmi *kubevirtv1.VirtualMachineInstance) error {
	o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID, o.Status.StartTime = vmi.Status.NodeName, vmi.Name, vmi.UID, nil
	o.Waiting(vmckptv1.ReasonBound, fmt.Sprintf("bound to node %s, whose agent has not taken it yet", vmi.Status.NodeName), r.Clock.Now())
	if err := r.Client.Status().Update(ctx, o); err != nil {
		return client.IgnoreNotFound(err)
	}
	r.Events.Eventf(o, nil, corev1.EventTypeNormal, vmckptv1.ReasonBound, "Bind", "bound to node %s", vmi.Status.NodeName)
	return nil
}

// deleted takes the finalizer off where no agent has to do anything, or none can.
func (r *Reconciler) deleted(ctx context.Context, o *vmckptv1.VMRestore) error {
	if !controllerutil.ContainsFinalizer(o, vmckptv1.Finalizer) {
		return nil
	}
	// One that no agent has begun with none will begin with, now that it is deleted: agents ask the API server before they begin.
	untouched := o.Status.StartTime == nil && o.Status.Attempts == 0
	if name := o.Status.NodeName; name != "" && !o.Done() && !untouched {
		_, state, err := node.Look(ctx, r.Client, r.Live, name)
		switch {
		case err != nil:
			return err
		case state == node.StateReady:
			if err := verdict.AgentsTurn(o.DeletionTimestamp.Time, r.Clock.Now()); err != nil {
				return err
			}
			return r.say(ctx, o, &o.Status, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf(
				"the agent of node %s ends the restore; if it does not run there, take the finalizer %s off to let the object go without", name, vmckptv1.Finalizer)))
		case state == node.StateNotReady:
			return r.say(ctx, o, &o.Status, verdict.Wait(vmckptv1.ReasonDeleting, fmt.Sprintf(
				"node %s is not ready: its agent ends the restore when it is again. To let the object go without, take the finalizer %s off", name, vmckptv1.Finalizer)))
		}
		r.Events.Eventf(o, nil, corev1.EventTypeWarning, vmckptv1.ReasonNodeGone, "Delete", "node %s is gone, and what became of the restore cannot be known", name)
	}
	before := o.DeepCopy()
	controllerutil.RemoveFinalizer(o, vmckptv1.Finalizer)
	return client.IgnoreNotFound(r.Client.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
