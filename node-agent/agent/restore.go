package agent

import (
	"context"
	"fmt"
	"strings"
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
	return enqueue(ctx, r.Agent, &o, &task{
		key: key, created: o.CreationTimestamp.Time, machine: machineName(o.Namespace, o.Status.VMIName),
		run: func(ctx context.Context) {
			ctx = log.IntoContext(ctx, log.FromContext(ctx).WithValues("restore", request.NamespacedName))
			r.run(ctx, key)
		},
		ended: r.again, object: o.DeepCopy(),
	}, r.ours)
}

func (r *restores) ours(o *vmckptv1.VMRestore) bool { return o.Status.NodeName == r.o.NodeName }

// working is ours and not at its end. One that is deleted past the mark is brought to its end all the same, and its end is written.
func (r *restores) working(o *vmckptv1.VMRestore) bool { return r.ours(o) && !o.Done() }

// run is the task: one attempt.
func (r *restores) run(ctx context.Context, key taskKey) {
	o := &vmckptv1.VMRestore{ObjectMeta: key.meta()}
	begin := func(o *vmckptv1.VMRestore) bool {
		return r.working(o) && o.DeletionTimestamp == nil && o.Status.Image != nil
	}
	err := change(ctx, r.Agent, o, begin, func(o *vmckptv1.VMRestore) bool {
		now := r.o.Clock.Now()
		if o.Status.StartTime == nil {
			o.Status.StartTime = &metav1.Time{Time: now}
		}
		o.Status.Attempts++
		// What an agent left that died before it could say so.
		if left, err := r.howLeft(ctx, o); err == nil && left != (jobs.Left{}) {
			say(o, left, now)
		}
		o.Waiting(vmckptv1.ReasonRunning, fmt.Sprintf("image %s is being restored on node %s", o.Status.Image.Image, r.o.NodeName), now)
		return true
	})
	if err != nil {
		r.unwritten(ctx, o, key, err, "a restore could not be begun")
		return
	}
	timed := ctx
	if !o.Unfinished() { // a machine that was left as it cannot stay is not given up for want of time
		var cancel context.CancelFunc
		timed, cancel = r.bounded(ctx, key, o.Status.StartTime, o.Spec.Timeout)
		defer cancel()
	}
	// Done by an agent that could not say so any more: it is not done again, since the guest has gone on.
	done, err := r.readNote(key.uid)
	if err == nil && done == nil {
		done = &note{}
		// A restore that is overwriting memory goes on to its end whatever becomes of this context.
		if done.Result, done.Found, err = r.work(timed, o, key); err == nil {
			r.writeNote(ctx, key.uid, done)
			r.o.Metrics.restores.WithLabelValues("ok").Inc()
			r.o.Metrics.restoreSeconds.Observe(done.Result.Duration.Seconds())
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
		o.Status.Duration = &metav1.Duration{Duration: result.Duration.Round(time.Millisecond)}
		o.Succeeded(vmckptv1.ReasonRestored, message, r.o.Clock.Now())
		return true
	})
	if err != nil {
		r.unwritten(ctx, o, key, err, "the end of a restore could not be written, which is complete")
		return
	}
	r.retries.forget(key)
	r.forgetNote(key.uid)
	r.madeWhole(ctx, o)
	log.FromContext(ctx).Info("a machine is restored", "image", found.Name)
	r.event(o, eventNormal, vmckptv1.ReasonRestored, "Restore", message)
}

// mostWarnings is how many a status has room for.
const mostWarnings = 16

// work does it.
func (r *restores) work(ctx context.Context, o *vmckptv1.VMRestore, key taskKey) (*restore.Result, *jobs.ImageResult, error) {
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
	repository, _, err := r.knownRepository(ctx, r.client, o.Namespace, o.Status.Image.ClaimName)
	if err != nil {
		return nil, nil, err
	}
	found, keyFile, err := r.find(ctx, volume, repository, keys, jobs.ImageRequest{Image: o.Status.Image.Image}, nil)
	if err != nil {
		return nil, nil, err
	}
	if digest := o.Status.Digest; digest != "" && digest != found.Digest.String() {
		return nil, nil, &unfitError{"OtherImage", fmt.Sprintf(
			"image %s on the claim is not the checkpoint's: its manifest has digest %s, and the checkpoint says %s", found.Name, found.Digest, digest)}
	}
	if err := r.checkOwner(o.Namespace, found); err != nil {
		return nil, nil, err
	}
	marked := false // as the API server knows
	progress := report(context.WithoutCancel(ctx), r.Agent, func(ctx context.Context, p restoreProgress) error {
		if p.memoryInvalid && !marked {
			err := r.writeMark(ctx, key)
			marked = err == nil
			return err
		}
		return r.writeProgress(ctx, &vmckptv1.VMRestore{ObjectMeta: key.meta()}, p.Progress)
	})
	defer progress.stop()
	told := false
	result, err := r.o.Engine.Restore(ctx, jobs.RestoreRequest{
		VM: machineOf(vmi), Repository: repositoryOn(volume, repository, keyFile), Image: found.Name,
		InPlace: o.Spec.Target.Mode == vmckptv1.RestoreInPlace, Run: o.Spec.After != vmckptv1.AfterPause, RecordDir: r.o.RecordDir,
	}, func(p restore.Progress) {
		progress.tell(restoreProgress{vmckptv1.Progress{Step: p.Phase, DoneBytes: p.DoneBytes, TotalBytes: p.TotalBytes}, p.MemoryInvalid})
		if p.MemoryInvalid && !told {
			told = true
			progress.hurry()
		}
	})
	return result, found, err
}

// restoreProgress is what is told of a restore at work.
type restoreProgress struct {
	vmckptv1.Progress
	memoryInvalid bool
}

// writeMark says that the machine's memory is being overwritten. The restore does not wait for it.
func (r *restores) writeMark(ctx context.Context, key taskKey) error {
	return change(ctx, r.Agent, &vmckptv1.VMRestore{ObjectMeta: key.meta()}, r.working, func(o *vmckptv1.VMRestore) bool {
		now := r.o.Clock.Now()
		o.SetMemoryInvalid(true, "the virtual machine's memory is being overwritten: it stands paused, and must not run until the restore is complete", now)
		o.SetLeftStopped(false, "the virtual machine's memory is being overwritten", now)
		return true
	})
}

// fail does what is to be done about an attempt that came to nothing.
func (r *restores) fail(ctx context.Context, o *vmckptv1.VMRestore, key taskKey, err error) {
	code := jobs.CodeOf(err)
	left, leftErr := r.howLeft(context.WithoutCancel(ctx), o)
	switch { // how it was left by this attempt, which may have been with a machine that cannot be found any more
	case code == jobs.CodeLost:
		left, leftErr = jobs.Left{MemoryInvalid: true}, nil
	case code == jobs.CodeStopped:
		left, leftErr = jobs.Left{Stopped: true}, nil
	}
	unfinished := left != jobs.Left{} || leftErr != nil && o.Unfinished()
	absent := code == jobs.CodeNoRepository
	f := r.weigh(ctx, key, attempt{number: o.Status.Attempts, start: o.Status.StartTime, timeout: o.Spec.Timeout, endless: unfinished || absent}, err)
	log.FromContext(ctx).Info("an attempt at a restore came to nothing", "error", err.Error(), "reason", f.reason)
	if f.verdict == leave {
		return
	}
	r.o.Metrics.restores.WithLabelValues(string(code)).Inc()
	reason, text := advice(left)
	if text != "" {
		f.message += ". " + strings.ToUpper(text[:1]) + text[1:]
	}
	err = change(context.WithoutCancel(ctx), r.Agent, o, r.working, func(o *vmckptv1.VMRestore) bool {
		now := r.o.Clock.Now()
		o.Status.Progress = nil
		if leftErr == nil {
			say(o, left, now)
		}
		switch {
		case f.verdict == giveBack:
			o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID, o.Status.StartTime = "", "", "", nil
		case f.verdict == retry && absent:
			o.Status.StartTime = nil
		}
		f.tell(o, now)
		return true
	})
	if err != nil {
		r.unwritten(ctx, o, key, err, "the failure of a restore could not be written")
		return
	}
	if f.verdict != retry {
		r.retries.forget(key)
	}
	r.event(o, eventWarning, f.reason, "Restore", f.message)
	if text != "" {
		r.warnMachine(ctx, o, reason, "Restore", fmt.Sprintf("restore %s: %s", o.Name, text))
	}
}

// deleted brings a restore to its end that was deleted. An attempt that has begun to overwrite memory is waited for. One that was torn before does
// not hold the object: as long as it is there no other restore of the machine begins, and only another one, of another checkpoint perhaps, makes
// the machine whole. The node's mark stays, which keeps it from being captured; it is not resumed; and it is told that it must not run.
func (r *restores) deleted(ctx context.Context, o *vmckptv1.VMRestore, key taskKey) (ctrl.Result, error) {
	if r.queue.cancel(key, errDeleted) {
		return ctrl.Result{}, nil // the end of the task brings it here again
	}
	r.retries.forget(key)
	r.forgetNote(key.uid)
	if !controllerutil.ContainsFinalizer(o, vmckptv1.Finalizer) {
		return ctrl.Result{}, nil
	}
	left, err := r.howLeft(ctx, o)
	if err != nil {
		log.FromContext(ctx).Info("how a machine was left cannot be seen", "error", err.Error())
		left.MemoryInvalid = meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid)
	}
	if reason, text := advice(left); text != "" {
		text = fmt.Sprintf("restore %s was deleted: %s", o.Name, text)
		log.FromContext(ctx).Info("a restore was deleted that has left its machine as it cannot stay", "restore", key.name, "reason", reason)
		r.event(o, eventWarning, reason, "Delete", text)
		r.warnMachine(ctx, o, reason, "Delete", text)
	}
	return ctrl.Result{}, r.letGo(ctx, o)
}
