package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// What checkpoints and restores have in common on their way through the queue.

// object is a VMCheckpoint or a VMRestore.
type object interface {
	client.Object
	Done() bool
	Waiting(reason, message string, now time.Time)
	Failed(reason, message string, now time.Time)
}

// meta names the object of a key, for reads and patches.
func (k taskKey) meta() metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: k.name.Namespace, Name: k.name.Name, UID: k.uid}
}

// enqueue puts an object's task into the queue, and says so where it has to wait.
func enqueue[T object](ctx context.Context, a *Agent, o T, t *task, ours func(T) bool) (ctrl.Result, error) {
	if running, waiting := a.queue.has(t.key); running || waiting {
		return ctrl.Result{}, nil
	}
	if wait := a.retries.left(t.key, a.o.Clock.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	if !a.queue.add(t) {
		return ctrl.Result{}, nil
	}
	err := change(ctx, a, o, ours, func(o T) bool {
		if _, waiting := a.queue.has(t.key); !waiting || o.Done() {
			return false
		}
		o.Waiting(vmckptv1.ReasonQueued, fmt.Sprintf("waits on node %s: it works on %d machines at once, one checkpoint or restore a machine", a.o.NodeName, a.o.Slots), a.o.Clock.Now())
		return true
	})
	return ctrl.Result{}, ignoreNotOurs(err)
}

// bounded is a context for the work on an object: it ends when the object's time is over. A clock that was put back gives it no more than it had,
// and where only a status is left to be written it has all of it once more.
func (a *Agent) bounded(ctx context.Context, key taskKey, start *metav1.Time, timeout metav1.Duration) (context.Context, context.CancelFunc) {
	left := timeLeft(start, timeout, a.o.Clock.Now())
	if a.retries.onlyUnwritten(key) {
		left = timeout.Duration
	}
	return context.WithTimeoutCause(ctx, left, errTimeout)
}

func timeLeft(start *metav1.Time, timeout metav1.Duration, now time.Time) time.Duration {
	if start == nil {
		return timeout.Duration
	}
	return min(start.Add(timeout.Duration).Sub(now), timeout.Duration)
}

// unwritten is called where a status could not be written. The object is looked at again, later and later; the queue goes on with others.
func (a *Agent) unwritten(ctx context.Context, o client.Object, key taskKey, err error, what string) {
	if errors.Is(err, errNotOurs) {
		a.retries.forget(key)
		return
	}
	a.retries.after(key, err, a.o.Clock.Now(), a.o.RetryAfter)
	log.FromContext(ctx).Error(err, what)
	if refused := (*refusedError)(nil); errors.As(err, &refused) {
		a.o.Metrics.refused.WithLabelValues(key.kind).Inc()
		a.event(o, eventWarning, "StatusRefused", "Write", fmt.Sprintf("%s: %v; tried again", what, err))
	}
}

// letGo takes the finalizer off.
func (a *Agent) letGo(ctx context.Context, o client.Object) error {
	before := o.DeepCopyObject().(client.Object)
	if !controllerutil.RemoveFinalizer(o, vmckptv1.Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(a.client.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
