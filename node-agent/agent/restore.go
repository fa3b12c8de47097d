package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/log"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// restores does the restores of this node.
type restores struct {
	*Agent
	again chan event.GenericEvent // objects whose task has ended
}

// Reconcile brings a restore into the queue, or one that was deleted to its end.
func (r *restores) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var o vmckptv1.VMRestore
	if err := r.client.Get(ctx, request.NamespacedName, &o); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !r.ours(&o) {
		return ctrl.Result{}, nil
	}
	key := taskKey{"VMRestore", request.NamespacedName, o.UID}
	if o.DeletionTimestamp != nil {
		return r.deleted(ctx, &o, key)
	}
	if o.Done() {
		return ctrl.Result{}, nil
	}
	if running, waiting := r.queue.has(key); running || waiting {
		return ctrl.Result{}, nil
	}
	if wait := r.retries.left(key, r.o.Clock.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	waits := r.queue.add(&task{
		key: key, created: o.CreationTimestamp.Time, machine: machineName(o.Namespace, o.Status.VMIName),
		run: func(ctx context.Context) {
			ctx = log.IntoContext(ctx, log.FromContext(ctx).WithValues("restore", request.NamespacedName))
			r.run(ctx, key)
		},
		ended: r.again, object: o.DeepCopy(),
	})
	if !waits {
		return ctrl.Result{}, nil
	}
	err := change(ctx, r.Agent, &o, r.ours, func(o *vmckptv1.VMRestore) bool {
		if _, waiting := r.queue.has(key); !waiting || hasReason(o.Status.Conditions, vmckptv1.ReasonQueued) || o.Done() {
			return false
		}
		o.Waiting(vmckptv1.ReasonQueued, fmt.Sprintf("waits on node %s: it works on %d machines at once, one checkpoint or restore a machine", r.o.NodeName, r.o.Slots), r.o.Clock.Now())
		return true
	})
	return ctrl.Result{}, ignoreNotOurs(err)
}

func (r *restores) ours(o *vmckptv1.VMRestore) bool { return o.Status.NodeName == r.o.NodeName }

// working is ours and not at its end. One that is deleted past the mark is brought to its end all the same, and its end is written.
func (r *restores) working(o *vmckptv1.VMRestore) bool { return r.ours(o) && !o.Done() }

// run is the task: one attempt.
func (r *restores) run(ctx context.Context, key taskKey) {
	logger := log.FromContext(ctx)
	o := &vmckptv1.VMRestore{ObjectMeta: metav1.ObjectMeta{Namespace: key.name.Namespace, Name: key.name.Name, UID: key.uid}}
	begin := func(o *vmckptv1.VMRestore) bool {
		return r.working(o) && o.DeletionTimestamp == nil && o.Status.Image != nil
	}
	err := change(ctx, r.Agent, o, begin, func(o *vmckptv1.VMRestore) bool {
		now := r.o.Clock.Now()
		// One that was cut short may have begun to overwrite memory, and gets all its time again.
		if o.Status.StartTime == nil || hasReason(o.Status.Conditions, vmckptv1.ReasonRunning) {
			o.Status.StartTime = &metav1.Time{Time: now}
		}
		o.Status.Attempts++
		o.Waiting(vmckptv1.ReasonRunning, fmt.Sprintf("image %s is being restored on node %s", o.Status.Image.Image, r.o.NodeName), now)
		return true
	})
	if err != nil {
		if !errors.Is(err, errNotOurs) {
			r.retries.after(key, err, r.o.Clock.Now(), r.o.RetryAfter)
			logger.Error(err, "a restore could not be begun")
		}
		return
	}
	timed, cancel := context.WithTimeoutCause(ctx, timeLeft(o.Status.StartTime, o.Spec.Timeout, r.o.Clock.Now()), errTimeout)
	defer cancel()
	// Done by an agent that could not say so any more: it is not done again, since the guest has gone on.
	done, err := r.readNote(key.uid)
	if err == nil && done == nil {
		done = &note{}
		// A restore that is overwriting memory goes on to its end whatever becomes of this context.
		if done.Result, done.Found, err = r.work(timed, o); err == nil {
			r.writeNote(ctx, key.uid, done)
		}
	}
	if err != nil {
		if jobs.CodeOf(err) == jobs.CodeLost { // came after it, and is to be written whoever wants the restore no more
			timed = context.WithoutCancel(timed)
		}
		r.fail(timed, o, key, err)
		return
	}
	result, found := done.Result, done.Found
	r.o.Metrics.restores.WithLabelValues("ok").Inc()
	r.o.Metrics.restoreSeconds.Observe(result.Duration.Seconds())
	state := "stands paused"
	if o.Spec.After != vmckptv1.AfterPause {
		state = "goes on"
	}
	message := fmt.Sprintf("restored from image %s in %v; the guest %s", found.Name, result.Duration.Round(time.Millisecond), state)
	err = change(context.WithoutCancel(ctx), r.Agent, o, r.working, func(o *vmckptv1.VMRestore) bool {
		o.Status.Digest = found.Digest.String()
		if c := found.Report; c != nil {
			o.Status.InstantTime = &metav1.MicroTime{Time: c.Instant}
		}
		o.Status.Warnings = nil
		for _, w := range result.Warnings[:min(len(result.Warnings), mostWarnings)] {
			o.Status.Warnings = append(o.Status.Warnings, clip(w, 1024))
		}
		o.Succeeded(vmckptv1.ReasonRestored, message, r.o.Clock.Now())
		return true
	})
	if err != nil {
		r.retries.after(key, err, r.o.Clock.Now(), r.o.RetryAfter)
		logger.Error(ignoreNotOurs(err), "the end of a restore could not be written")
		return
	}
	r.retries.forget(key)
	r.forgetNote(key.uid)
	logger.Info("a machine is restored", "image", found.Name)
	r.event(o, eventNormal, vmckptv1.ReasonRestored, "Restore", message)
}

// mostWarnings is how many a status has room for.
const mostWarnings = 16

// work does it.
func (r *restores) work(ctx context.Context, o *vmckptv1.VMRestore) (*restore.Result, *jobs.ImageResult, error) {
	vmi, err := r.findVMI(ctx, types.NamespacedName{Namespace: o.Namespace, Name: o.Status.VMIName}, o.Status.VMIUID)
	if err != nil {
		return nil, nil, err
	}
	volume, err := r.o.Volumes.Path(ctx, types.NamespacedName{Namespace: o.Namespace, Name: o.Status.Image.ClaimName})
	if err != nil {
		return nil, nil, err
	}
	keys, err := r.o.Keys.files(ctx)
	if err != nil {
		return nil, nil, err
	}
	found, keyFile, err := tryKeys(keys, func(keyFile string) (*jobs.ImageResult, error) {
		return r.o.Engine.Image(ctx, jobs.ImageRequest{Repository: repositoryOn(volume, keyFile), Image: o.Status.Image.Image}, func(jobs.VerifyProgress) {})
	})
	if err != nil {
		return nil, nil, err
	}
	if digest := o.Status.Digest; digest != "" && digest != found.Digest.String() {
		return nil, nil, &otherImageError{name: found.Name, want: digest, found: found.Digest.String()}
	}
	progress := report(context.WithoutCancel(ctx), r.Agent, func(ctx context.Context, p vmckptv1.Progress) error { return r.writeProgress(ctx, o, p) })
	defer progress.stop()
	result, err := r.o.Engine.Restore(ctx, jobs.RestoreRequest{
		VM: machineOf(vmi), Repository: repositoryOn(volume, keyFile), Image: found.Name,
		InPlace: o.Spec.Target.Mode == vmckptv1.RestoreInPlace, Run: o.Spec.After != vmckptv1.AfterPause, RecordDir: r.o.RecordDir,
	}, func(p restore.Progress) {
		progress.tell(vmckptv1.Progress{Step: p.Phase, DoneBytes: p.DoneBytes, TotalBytes: p.TotalBytes})
	})
	return result, found, err
}

// otherImageError says that the image is not the one that the checkpoint's object stands for.
type otherImageError struct{ name, want, found string }

func (e *otherImageError) Error() string {
	return fmt.Sprintf("image %s on the claim is not the checkpoint's: its manifest has digest %s, and the checkpoint says %s", e.name, e.found, e.want)
}

func (r *restores) writeProgress(ctx context.Context, o *vmckptv1.VMRestore, p vmckptv1.Progress) error {
	p.Time = metav1.Time{Time: r.o.Clock.Now()}
	patch, err := progressPatch(o.UID, p)
	if err != nil {
		return err
	}
	return r.client.Status().Patch(ctx, &vmckptv1.VMRestore{ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name}}, patch)
}

// fail does what is to be done about an attempt that came to nothing.
func (r *restores) fail(ctx context.Context, o *vmckptv1.VMRestore, key taskKey, err error) {
	what, reason := judge(ctx, err)
	if other := (*otherImageError)(nil); errors.As(err, &other) {
		what, reason = giveUp, "OtherImage"
	}
	code := jobs.CodeOf(err)
	log.FromContext(ctx).Info("an attempt at a restore came to nothing", "error", err.Error(), "reason", reason)
	if what == leave {
		return
	}
	r.o.Metrics.restores.WithLabelValues(string(code)).Inc()
	var wait time.Duration
	if reason == vmckptv1.ReasonTimeout {
		err = r.retries.timedOut(key, o.Spec.Timeout.Duration, err)
	}
	if what == retry {
		wait = r.retries.after(key, err, r.o.Clock.Now(), r.o.RetryAfter)
		// A machine that must not run as it is, or that we have stopped, is not given up for want of time.
		mustEnd := code == jobs.CodeLost || code == jobs.CodeStopped || meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
		if !mustEnd && wait > timeLeft(o.Status.StartTime, o.Spec.Timeout, r.o.Clock.Now()) {
			what = giveUp
			err = fmt.Errorf("%w; there is no time left for another attempt (timeout %v)", err, o.Spec.Timeout.Duration)
		}
	}
	message := fmt.Sprintf("attempt %d: %v", o.Status.Attempts, err)
	writeErr := change(context.WithoutCancel(ctx), r.Agent, o, r.working, func(o *vmckptv1.VMRestore) bool {
		now := r.o.Clock.Now()
		o.Status.Progress = nil
		if code == jobs.CodeLost {
			o.SetMemoryInvalid(true, "the machine's memory is half overwritten; it stands paused and must not run: only a restore makes it whole", now)
		}
		switch what {
		case giveBack:
			o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID, o.Status.StartTime = "", "", "", nil
			o.Waiting(reason, err.Error()+"; the restore waits for the machine", now)
		case retry:
			o.Waiting(vmckptv1.ReasonRetrying, fmt.Sprintf("%s; tried again in %v", message, wait.Round(time.Second)), now)
		case giveUp:
			o.Failed(reason, message, now)
		}
		return true
	})
	if writeErr != nil {
		log.FromContext(ctx).Error(ignoreNotOurs(writeErr), "the failure of a restore could not be written")
		return
	}
	if what != retry {
		r.retries.forget(key)
	}
	r.event(o, eventWarning, reason, "Restore", message)
}

// deleted brings a restore to its end that was deleted. One that has begun to overwrite memory is waited for.
func (r *restores) deleted(ctx context.Context, o *vmckptv1.VMRestore, key taskKey) (ctrl.Result, error) {
	if r.queue.cancel(key, errDeleted) {
		return ctrl.Result{}, nil // the end of the task brings it here again
	}
	r.retries.forget(key)
	r.forgetNote(key.uid)
	if !controllerutil.ContainsFinalizer(o, vmckptv1.Finalizer) {
		return ctrl.Result{}, nil
	}
	before := o.DeepCopy()
	controllerutil.RemoveFinalizer(o, vmckptv1.Finalizer)
	return ctrl.Result{}, client.IgnoreNotFound(r.client.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}
