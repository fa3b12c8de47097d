package agent

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
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
	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// Attributes of images, by which they are known again.
const (
	attributeNamespace = "checkpoint.namespace"
	attributeName      = "checkpoint.name"
	attributeUID       = "checkpoint.uid"
	attributeVMIUID    = "vmi.uid"
	attributeCluster   = "cluster.uid" // of the namespace kube-system, which lives as long as the cluster
)

// checkpoints takes the checkpoints of this node.
type checkpoints struct {
	*Agent
	again chan event.GenericEvent // objects whose task has ended
}

// Reconcile brings a checkpoint into the queue, or one that was deleted to its end.
func (c *checkpoints) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var o vmckptv1.VMCheckpoint
	if err := c.client.Get(ctx, request.NamespacedName, &o); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !c.ours(&o) {
		return ctrl.Result{}, nil
	}
	key := taskKey{"VMCheckpoint", request.NamespacedName, o.UID}
	if o.DeletionTimestamp != nil {
		return c.deleted(ctx, &o, key)
	}
	if o.Done() {
		return ctrl.Result{}, nil
	}
	if running, waiting := c.queue.has(key); running || waiting {
		return ctrl.Result{}, nil
	}
	if wait := c.retries.left(key, c.o.Clock.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	waits := c.queue.add(&task{
		key: key, created: o.CreationTimestamp.Time, machine: machineName(o.Namespace, o.Status.VMIName),
		run: func(ctx context.Context) {
			ctx = log.IntoContext(ctx, log.FromContext(ctx).WithValues("checkpoint", request.NamespacedName))
			c.run(ctx, key)
		},
		ended: c.again, object: o.DeepCopy(),
	})
	if !waits {
		return ctrl.Result{}, nil
	}
	err := change(ctx, c.Agent, &o, c.ours, func(o *vmckptv1.VMCheckpoint) bool {
		if _, waiting := c.queue.has(key); !waiting || hasReason(o.Status.Conditions, vmckptv1.ReasonQueued) || o.Done() {
			return false
		}
		o.Waiting(vmckptv1.ReasonQueued, fmt.Sprintf("waits on node %s: it works on %d machines at once, one checkpoint or restore a machine", c.o.NodeName, c.o.Slots), c.o.Clock.Now())
		return true
	})
	return ctrl.Result{}, ignoreNotOurs(err)
}

func (c *checkpoints) ours(o *vmckptv1.VMCheckpoint) bool { return o.Status.NodeName == c.o.NodeName }

// working is ours and not at its end.
func (c *checkpoints) working(o *vmckptv1.VMCheckpoint) bool {
	return c.ours(o) && !o.Done() && o.DeletionTimestamp == nil
}

// run is the task: one attempt.
func (c *checkpoints) run(ctx context.Context, key taskKey) {
	logger := log.FromContext(ctx)
	o := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: key.name.Namespace, Name: key.name.Name, UID: key.uid}}
	// The API server's word: the cache may be behind.
	err := change(ctx, c.Agent, o, c.working, func(o *vmckptv1.VMCheckpoint) bool {
		now := c.o.Clock.Now()
		if o.Status.StartTime == nil {
			o.Status.StartTime = &metav1.Time{Time: now}
		}
		o.Status.Attempts++
		what := "is being captured"
		if o.Spec.Import != nil {
			what = fmt.Sprintf("image %s is being verified", o.Spec.Import.Image)
		}
		o.Waiting(vmckptv1.ReasonRunning, fmt.Sprintf("%s on node %s", what, c.o.NodeName), now)
		return true
	})
	if err != nil {
		if !errors.Is(err, errNotOurs) {
			c.retries.after(key, err, c.o.Clock.Now(), c.o.RetryAfter)
			logger.Error(err, "a checkpoint could not be begun")
		}
		return
	}
	work, cancel := context.WithTimeoutCause(ctx, timeLeft(o.Status.StartTime, o.Spec.Timeout, c.o.Clock.Now()), errTimeout)
	defer cancel()
	outcome, err := c.work(work, o)
	if err != nil {
		c.fail(work, o, key, err)
		return
	}
	err = change(context.WithoutCancel(ctx), c.Agent, o, c.ours, func(o *vmckptv1.VMCheckpoint) bool {
		if o.Done() {
			return false
		}
		outcome.describe(o)
		o.Succeeded(outcome.reason, outcome.message, c.o.Clock.Now())
		return true
	})
	if err != nil {
		c.retries.after(key, err, c.o.Clock.Now(), c.o.RetryAfter)
		logger.Error(ignoreNotOurs(err), "the end of a checkpoint could not be written")
		return
	}
	c.retries.forget(key)
	logger.Info("a checkpoint is ready", "image", outcome.image.Name, "reason", outcome.reason)
	c.event(o, eventNormal, outcome.reason, "Capture", outcome.message)
}

// timeLeft is what is left of an object's time. A clock that was put back gives it no more than it had.
func timeLeft(start *metav1.Time, timeout metav1.Duration, now time.Time) time.Duration {
	return min(start.Add(timeout.Duration).Sub(now), timeout.Duration)
}

// outcome is an image that is whole.
type outcome struct {
	reason, message string
	image           *jobs.ImageResult
}

// work does it, from the claim to the image.
func (c *checkpoints) work(ctx context.Context, o *vmckptv1.VMCheckpoint) (*outcome, error) {
	cluster, err := c.clusterUID(ctx)
	if err != nil {
		return nil, err
	}
	request := jobs.CaptureRequest{
		Name: o.Name, RecordDir: c.o.RecordDir, Witness: c.o.Witness,
		Attributes: map[string]string{
			attributeCluster: cluster, attributeNamespace: o.Namespace, attributeName: o.Name, attributeUID: string(o.UID),
		},
	}
	if o.Spec.Import == nil {
		vmi, err := c.findVMI(ctx, types.NamespacedName{Namespace: o.Namespace, Name: o.Status.VMIName}, o.Status.VMIUID)
		if err != nil {
			return nil, err
		}
		request.VM = machineOf(vmi)
		request.Attributes[attributeVMIUID] = string(vmi.UID)
	}
	volume, err := c.o.Volumes.Path(ctx, types.NamespacedName{Namespace: o.Namespace, Name: o.Spec.Storage.ClaimName})
	if err != nil {
		return nil, err
	}
	keys, err := c.o.Keys.files(ctx)
	if err != nil {
		return nil, err
	}
	progress := report(ctx, c.Agent, func(ctx context.Context, p vmckptv1.Progress) error { return c.writeProgress(ctx, o, p) })
	defer progress.stop()

	// An image of this name may be there: that of an agent which died before it could say so, or that of another life of the cluster.
	name := o.Name
	if o.Spec.Import != nil {
		name = o.Spec.Import.Image
	}
	found, _, err := tryKeys(keys, func(keyFile string) (*jobs.ImageResult, error) {
		return c.o.Engine.Image(ctx, jobs.ImageRequest{
			Repository: repositoryOn(volume, keyFile), Image: name,
			Verify: o.Spec.Import != nil, Make: o.Spec.Import == nil, Sweep: o.Spec.Import == nil,
		}, func(p jobs.VerifyProgress) {
			progress.tell(vmckptv1.Progress{Step: "verifying", DoneBytes: p.DoneBytes, TotalBytes: p.TotalBytes})
		})
	})
	switch {
	case err == nil && o.Spec.Import != nil:
		return &outcome{vmckptv1.ReasonAdopted, fmt.Sprintf("image %s, taken %s, is verified", name, found.Created.Format(time.RFC3339)), found}, nil
	case err == nil && found.Attributes[attributeUID] == string(o.UID):
		return captured(found), nil
	case err == nil && found.Attributes[attributeNamespace] == o.Namespace && found.Attributes[attributeName] == o.Name &&
		found.Attributes[capture.AttributeGuest] == request.VM.Guest && found.Attributes[attributeCluster] != cluster:
		// Of the same checkpoint in another life of the cluster. In this one it would be that of an object that was deleted and made anew, whose
		// owner wants a new image.
		return &outcome{vmckptv1.ReasonAdopted, fmt.Sprintf("the claim has an image of this checkpoint already, taken %s; nothing was captured", found.Created.Format(time.RFC3339)), found}, nil
	case err == nil:
		return nil, &takenError{name: name, by: found.Attributes[attributeNamespace] + "/" + found.Attributes[attributeName]}
	case jobs.CodeOf(err) != jobs.CodeNotFound || o.Spec.Import != nil:
		return nil, err
	}

	request.Repository = repositoryOn(volume, keys.current)
	request.OtherKeys = len(keys.all) > 1
	request.Mode, request.Compression = modes[o.Spec.Mode], compressions[o.Spec.Compression]
	result, err := c.o.Engine.Capture(ctx, request, func(p capture.Progress) { progress.tell(captureProgress(p)) })
	if err != nil {
		return nil, err
	}
	kind := "base"
	if result.Parent != "" {
		kind = "increment"
	}
	c.o.Metrics.captured(kind, result)
	found, err = c.o.Engine.Image(ctx, jobs.ImageRequest{Repository: request.Repository, Image: name}, func(jobs.VerifyProgress) {})
	if err != nil {
		return nil, fmt.Errorf("look at what was captured: %w", err)
	}
	found.Report = result
	return captured(found), nil
}

// captured is the outcome of a capture.
func captured(found *jobs.ImageResult) *outcome {
	message := fmt.Sprintf("captured as image %s", found.Name)
	if r := found.Report; r != nil {
		message = fmt.Sprintf("captured in %v; the guest stood still for %v", r.Duration.Round(time.Millisecond), r.Downtime.Round(100*time.Microsecond))
	}
	return &outcome{vmckptv1.ReasonCaptured, message, found}
}

// takenError says that the name of an image is another's.
type takenError struct{ name, by string }

func (e *takenError) Error() string {
	return fmt.Sprintf("the claim has an image %s already, of checkpoint %s: give this one another name, or import that one", e.name, e.by)
}

func (e *takenError) Unwrap() error { return image.ErrExists }

// repositoryOn is the repository of a claim's volume.
func repositoryOn(volume, keyFile string) jobs.Repository {
	return jobs.Repository{Volume: volume, Dir: repositoryDir, KeyFile: keyFile}
}

var modes = map[vmckptv1.Mode]capture.Mode{
	vmckptv1.ModeAuto: capture.Auto, vmckptv1.ModeFull: capture.Full, vmckptv1.ModeIncremental: capture.Incremental,
}

var compressions = map[vmckptv1.Compression]image.Compression{
	vmckptv1.CompressionZstd: image.Zstd, vmckptv1.CompressionS2: image.S2, vmckptv1.CompressionNone: image.None,
}

func captureProgress(p capture.Progress) vmckptv1.Progress {
	return vmckptv1.Progress{
		Step: p.Phase, DoneBytes: int64(p.DonePages) * pageBytes, TotalBytes: int64(p.TotalPages) * pageBytes, StoredBytes: p.Image.StoredBytes,
	}
}

const pageBytes = 4096

// writeProgress writes nothing else, and does not mind who wrote in between.
func (c *checkpoints) writeProgress(ctx context.Context, o *vmckptv1.VMCheckpoint, p vmckptv1.Progress) error {
	p.Time = metav1.Time{Time: c.o.Clock.Now()}
	patch, err := progressPatch(o.UID, p)
	if err != nil {
		return err
	}
	return c.client.Status().Patch(ctx, &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name}}, patch)
}

// fail does what is to be done about an attempt that came to nothing.
func (c *checkpoints) fail(ctx context.Context, o *vmckptv1.VMCheckpoint, key taskKey, err error) {
	what, reason := judge(ctx, err)
	log.FromContext(ctx).Info("an attempt at a checkpoint came to nothing", "error", err.Error(), "reason", reason)
	if what == leave {
		return
	}
	c.o.Metrics.captures.WithLabelValues("", string(jobs.CodeOf(err))).Inc()
	var wait time.Duration
	if reason == vmckptv1.ReasonTimeout {
		err = c.retries.timedOut(key, o.Spec.Timeout.Duration, err)
	}
	if what == retry {
		wait = c.retries.after(key, err, c.o.Clock.Now(), c.o.RetryAfter)
		if wait > timeLeft(o.Status.StartTime, o.Spec.Timeout, c.o.Clock.Now()) {
			what = giveUp
			err = fmt.Errorf("%w; there is no time left for another attempt (timeout %v)", err, o.Spec.Timeout.Duration)
		}
	}
	message := fmt.Sprintf("attempt %d: %v", o.Status.Attempts, err)
	writeErr := change(context.WithoutCancel(ctx), c.Agent, o, c.working, func(o *vmckptv1.VMCheckpoint) bool {
		now := c.o.Clock.Now()
		o.Status.Progress = nil
		switch what {
		case giveBack:
			o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID, o.Status.StartTime = "", "", "", nil
			o.Waiting(reason, err.Error()+"; the checkpoint waits for the machine", now)
		case retry:
			o.Waiting(vmckptv1.ReasonRetrying, fmt.Sprintf("%s; tried again in %v", message, wait.Round(time.Second)), now)
		case giveUp:
			o.Failed(reason, message, now)
		}
		return true
	})
	if writeErr != nil {
		if what != retry {
			c.retries.after(key, err, c.o.Clock.Now(), c.o.RetryAfter)
		}
		log.FromContext(ctx).Error(ignoreNotOurs(writeErr), "the failure of a checkpoint could not be written")
		return
	}
	if what != retry {
		c.retries.forget(key)
	}
	c.event(o, eventWarning, reason, "Capture", message)
}

// describe puts what is known of the image into the status.
func (r *outcome) describe(o *vmckptv1.VMCheckpoint) {
	i := r.image
	kind := vmckptv1.ImageBase
	if i.Parent != "" {
		kind = vmckptv1.ImageIncrement
	}
	s := &o.Status
	s.Image = &vmckptv1.CheckpointImage{
		Name: i.Name, Path: path.Join(repositoryDir, "images", i.Name), Digest: i.Digest.String(), Kind: kind, Parent: i.Parent, Encrypted: i.Encrypted,
	}
	s.Size = sizeOf(i.OwnBytes)
	p := i.Pages
	s.Memory = &vmckptv1.MemoryBreakdown{
		TotalPages: int64(p.Total), UnpopulatedPages: int64(p.Unpopulated), UniformPages: int64(p.Uniform), EvictedPages: int64(p.Evicted),
		StoredPages: int64(p.Stored), InheritedPages: int64(p.Inherited), UnchangedPages: int64(p.Unchanged), WrittenPages: int64(p.Written),
		StoredBytes: p.WrittenBytes,
	}
	c := i.Report
	if c == nil {
		return
	}
	s.InstantTime = &metav1.MicroTime{Time: c.Instant}
	s.Duration = &metav1.Duration{Duration: c.Duration.Round(time.Millisecond)}
	s.Downtime = &metav1.Duration{Duration: c.Downtime.Round(10 * time.Microsecond)}
	s.DirtySource, s.Note = clip(c.Source, 64), clip(c.Why, 1024)
	s.Witness = nil
	if w := c.Witness; w != nil {
		s.Witness = &vmckptv1.Witness{Compared: w.Compared, MissedPages: int64(w.Missed), UnseenPages: int64(w.Unseen), NestedGuests: w.Nested, Note: clip(w.Why, 1024)}
	}
	s.Pauses = nil
	for _, p := range c.Pauses[:min(len(c.Pauses), mostPauses)] {
		s.Pauses = append(s.Pauses, vmckptv1.Pause{For: clip(p.For, 32), Duration: metav1.Duration{Duration: p.Total.Round(time.Microsecond)}, Lost: p.Lost})
	}
}

// mostPauses is how many a status has room for.
const mostPauses = 64

// deleted brings a checkpoint to its end that was deleted: its work ended, its image removed or left as it wants, its finalizer taken off.
func (c *checkpoints) deleted(ctx context.Context, o *vmckptv1.VMCheckpoint, key taskKey) (ctrl.Result, error) {
	if c.queue.cancel(key, errDeleted) {
		return ctrl.Result{}, nil // the end of the task brings it here again
	}
	c.retries.forget(key)
	if !controllerutil.ContainsFinalizer(o, vmckptv1.Finalizer) {
		return ctrl.Result{}, nil
	}
	if o.Spec.DeletionPolicy != vmckptv1.DeletionRetain {
		if err := c.removeImage(ctx, o); err != nil {
			wait := c.retries.after(key, err, c.o.Clock.Now(), c.o.RetryAfter)
			err := change(ctx, c.Agent, o, c.ours, func(o *vmckptv1.VMCheckpoint) bool {
				o.Waiting(vmckptv1.ReasonDeleting, fmt.Sprintf("its image cannot be removed: %v; tried again in %v. To let it go without, take the finalizer %s off", err, wait.Round(time.Second), vmckptv1.Finalizer), c.o.Clock.Now())
				return true
			})
			return ctrl.Result{RequeueAfter: wait}, ignoreNotOurs(err)
		}
	}
	c.retries.forget(key)
	before := o.DeepCopy()
	controllerutil.RemoveFinalizer(o, vmckptv1.Finalizer)
	return ctrl.Result{}, client.IgnoreNotFound(c.client.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}

// removeImage removes the image of a checkpoint, unless another object stands for it too.
func (c *checkpoints) removeImage(ctx context.Context, o *vmckptv1.VMCheckpoint) error {
	name := o.Name
	if o.Spec.Import != nil {
		name = o.Spec.Import.Image
	}
	var others vmckptv1.VMCheckpointList
	if err := c.live.List(ctx, &others, client.InNamespace(o.Namespace)); err != nil {
		return fmt.Errorf("list the checkpoints: %w", err)
	}
	for _, other := range others.Items {
		if other.UID == o.UID || other.Spec.Storage.ClaimName != o.Spec.Storage.ClaimName {
			continue
		}
		stands := other.Status.Image != nil && other.Status.Image.Name == name ||
			other.Spec.Import != nil && other.Spec.Import.Image == name && !other.Done()
		if stands && (other.DeletionTimestamp == nil || other.Spec.DeletionPolicy == vmckptv1.DeletionRetain) {
			return nil
		}
	}
	volume, err := c.o.Volumes.Path(ctx, types.NamespacedName{Namespace: o.Namespace, Name: o.Spec.Storage.ClaimName})
	if gone := (*VolumeError)(nil); errors.As(err, &gone) && gone.Missing {
		return nil // and the image with it
	}
	if err != nil {
		return err
	}
	keys, err := c.o.Keys.files(ctx)
	if err != nil {
		return err
	}
	found, keyFile, err := tryKeys(keys, func(keyFile string) (*jobs.ImageResult, error) {
		return c.o.Engine.Image(ctx, jobs.ImageRequest{Repository: repositoryOn(volume, keyFile), Image: name}, func(jobs.VerifyProgress) {})
	})
	switch code := jobs.CodeOf(err); {
	case err == nil && o.Status.Image == nil && found.Attributes[attributeUID] != string(o.UID):
		return nil // of another checkpoint: this one has made none
	case err == nil && o.Status.Image != nil && found.Digest.String() != o.Status.Image.Digest:
		return nil // another has taken its name since
	case err == nil:
	case code == jobs.CodeNotFound:
		return nil
	case code == jobs.CodeDamaged && o.Status.Image != nil:
		keyFile = keys.current // damaged or not, it is this object's
	default:
		return err
	}
	err = c.o.Engine.Delete(ctx, jobs.DeleteRequest{Repository: repositoryOn(volume, keyFile), Image: name})
	if jobs.CodeOf(err) == jobs.CodeNotFound {
		return nil
	}
	return err
}

// retries remembers when objects are tried again. An agent that starts anew tries at once.
type retries struct {
	mu sync.Mutex
	at map[taskKey]retryState
}

type retryState struct {
	failures int
	next     time.Time
	last     string // what the last failure was
}

// after notes a failure and returns how long is waited.
func (r *retries) after(key taskKey, failure error, now time.Time, wait func(int) time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.at[key]
	s.last = failure.Error()
	s.failures++
	d := wait(s.failures)
	s.next = now.Add(d)
	if r.at == nil {
		r.at = map[taskKey]retryState{}
	}
	r.at[key] = s
	return d
}

// left is how long an object still waits.
func (r *retries) left(key taskKey, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at[key].next.Sub(now)
}

// timedOut says of an object whose time is over what was in the way, rather than what was interrupted.
func (r *retries) timedOut(key taskKey, timeout time.Duration, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last := r.at[key].last; last != "" {
		return fmt.Errorf("not done in %v; the attempt before failed: %s", timeout, last)
	}
	return fmt.Errorf("not done in %v: %w", timeout, err)
}

func (r *retries) forget(key taskKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.at, key)
}

func hasReason(conditions []metav1.Condition, reason string) bool {
	c := meta.FindStatusCondition(conditions, vmckptv1.ConditionProgressing)
	return c != nil && c.Reason == reason
}

func ignoreNotOurs(err error) error {
	if errors.Is(err, errNotOurs) {
		return nil
	}
	return err
}
