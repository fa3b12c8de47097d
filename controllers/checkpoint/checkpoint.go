package checkpoint

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
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
	"github.com/vmckpt/vmckpt/controllers/verdict"
	"github.com/vmckpt/vmckpt/controllers/vm"
)

// Reconciler binds checkpoints to nodes.
type Reconciler struct {
	Client client.Client
	Events events.EventRecorder
	Clock  clock.Clock
}

// Indexes by which checkpoints are found for what changed.
const (
	byMachine = "spec.source.name"
	byClaim   = "spec.storage.claimName"
)

// claimEvery is how often is looked again at a claim that a node does not reach.
const claimEvery = time.Minute

// SetupWithManager adds the reconciler to a manager.
func (r *Reconciler) SetupWithManager(ctx context.Context, m ctrl.Manager) error {
	indexer := m.GetFieldIndexer()
	for field, value := range map[string]func(*vmckptv1.VMCheckpoint) string{
		byMachine: func(c *vmckptv1.VMCheckpoint) string { return c.Spec.Source.Name },
		byClaim:   func(c *vmckptv1.VMCheckpoint) string { return c.Spec.Storage.ClaimName },
	} {
		err := indexer.IndexField(ctx, &vmckptv1.VMCheckpoint{}, field, func(o client.Object) []string {
			c := o.(*vmckptv1.VMCheckpoint)
			if c.Done() || c.Status.NodeName != "" {
				return nil // nothing wakes it
			}
			return []string{value(c)}
		})
		if err != nil {
			return fmt.Errorf("index checkpoints by %s: %w", field, err)
		}
	}
	ofName := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return r.waiting(ctx, o.GetNamespace(), byMachine, o.GetName())
	})
	return ctrl.NewControllerManagedBy(m).Named("checkpoint").For(&vmckptv1.VMCheckpoint{}).
		Watches(&kubevirtv1.VirtualMachine{}, ofName).
		Watches(&kubevirtv1.VirtualMachineInstance{}, ofName).
		Watches(&vmckptv1.VMRestore{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.waiting(ctx, o.GetNamespace(), byMachine, o.(*vmckptv1.VMRestore).Spec.Target.Name)
		})).
		Watches(&corev1.PersistentVolumeClaim{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.waiting(ctx, o.GetNamespace(), byClaim, o.GetName())
		})).
		Watches(&corev1.PersistentVolume{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			ref := o.(*corev1.PersistentVolume).Spec.ClaimRef
			if ref == nil {
				return nil
			}
			return r.waiting(ctx, ref.Namespace, byClaim, ref.Name)
		})).
		WithOptions(controller.Options{MaxConcurrentReconciles: 4}).Complete(r)
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
	c := &vmckptv1.VMCheckpoint{}
	if err := r.Client.Get(ctx, request.NamespacedName, c); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if c.DeletionTimestamp != nil {
		return ctrl.Result{}, r.deleted(ctx, c)
	}
	if c.Done() || c.Status.NodeName != "" {
		return ctrl.Result{}, nil
	}
	// By a patch: an update would write the timeout in Go's spelling (10m0s for 10m), and take the field from whoever applied it.
	asRead := c.DeepCopy()
	if controllerutil.AddFinalizer(c, vmckptv1.Finalizer) {
		err := r.Client.Patch(ctx, c, client.MergeFromWithOptions(asRead, client.MergeFromWithOptimisticLock{}))
		return ctrl.Result{}, client.IgnoreNotFound(err) // which brings it here again
	}
	node, vmi, v, err := r.place(ctx, c)
	switch {
	case err != nil:
		return ctrl.Result{}, err
	case v != nil && v.Reason == vmckptv1.ReasonClaim && !v.Final:
		return ctrl.Result{RequeueAfter: claimEvery}, r.say(ctx, c, v) // nodes and their labels are not watched
	case v != nil:
		return ctrl.Result{}, r.say(ctx, c, v)
	}
	return ctrl.Result{}, r.bind(ctx, c, node, vmi)
}

// place finds the node for a checkpoint, and the instance that it is of, or what stands against it.
func (r *Reconciler) place(ctx context.Context, c *vmckptv1.VMCheckpoint) (node string, vmi *kubevirtv1.VirtualMachineInstance, v *verdict.Verdict, err error) {
	name := types.NamespacedName{Namespace: c.Namespace, Name: c.Spec.Storage.ClaimName}
	if c.Spec.Import != nil {
		pv, v, err := claim.Usable(ctx, r.Client, name)
		if v != nil || err != nil {
			return "", nil, v, err
		}
		node, err := claim.AnyNode(ctx, r.Client, pv)
		if node == "" && err == nil {
			v = verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf("no node that runs virtual machines reaches the volume of claim %v", name))
		}
		return node, nil, v, err
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
	pv, v, err := claim.Usable(ctx, r.Client, name)
	if v != nil || err != nil {
		return "", nil, v, err
	}
	if v, err = claim.OnNode(ctx, r.Client, name, pv, vmi.Status.NodeName); v != nil || err != nil {
		return "", nil, v, err
	}
	return vmi.Status.NodeName, vmi, nil, nil
}

// restoreFirst lets a restore of the same machine go first, whichever was made first: what it will overwrite is not worth a checkpoint.
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
		return verdict.Wait(vmckptv1.ReasonRestoring, fmt.Sprintf("restore %s of virtual machine %s comes first", o.Name, vmi.Name)), nil
	}
	return nil, nil
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
	r.Events.Eventf(c, nil, kind, v.Reason, "Bind", "%s", v.Note())
	return nil
}

// bind gives the checkpoint to a node's agent.
func (r *Reconciler) bind(ctx context.Context, c *vmckptv1.VMCheckpoint, node string, vmi *kubevirtv1.VirtualMachineInstance) error {
	c.Status.NodeName, c.Status.StartTime = node, nil
	if vmi != nil {
		c.Status.VMIName, c.Status.VMIUID = vmi.Name, vmi.UID
	}
	message := fmt.Sprintf("bound to node %s, whose agent has not taken it yet", node)
	c.Waiting(vmckptv1.ReasonBound, message, r.Clock.Now())
	if err := r.Client.Status().Update(ctx, c); err != nil {
		return client.IgnoreNotFound(err)
	}
	r.Events.Eventf(c, nil, corev1.EventTypeNormal, vmckptv1.ReasonBound, "Bind", "bound to node %s", node)
	return nil
}

// deleted takes the finalizer off where no agent has to do anything.
func (r *Reconciler) deleted(ctx context.Context, c *vmckptv1.VMCheckpoint) error {
	if c.Status.NodeName != "" && (c.Spec.DeletionPolicy != vmckptv1.DeletionRetain || !c.Done()) {
		return nil // the agent's
	}
	before := c.DeepCopy()
	if !controllerutil.RemoveFinalizer(c, vmckptv1.Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(r.Client.Patch(ctx, c, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
