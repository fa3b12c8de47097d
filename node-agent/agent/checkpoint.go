package agent

import (
	"context"
	"fmt"
	"path"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
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
	return enqueue(ctx, c.Agent, &o, &task{
		key: key, created: o.CreationTimestamp.Time, machine: machineName(o.Namespace, o.Status.VMIName),
		run: func(ctx context.Context) {
			ctx = log.IntoContext(ctx, log.FromContext(ctx).WithValues("checkpoint", request.NamespacedName))
			c.run(ctx, key)
		},
		ended: c.again, object: o.DeepCopy(),
	}, c.ours)
}

func (c *checkpoints) ours(o *vmckptv1.VMCheckpoint) bool { return o.Status.NodeName == c.o.NodeName }

// working is ours and not at its end.
func (c *checkpoints) working(o *vmckptv1.VMCheckpoint) bool {
	return c.ours(o) && !o.Done() && o.DeletionTimestamp == nil
}

// run is the task: one attempt.
func (c *checkpoints) run(ctx context.Context, key taskKey) {
	o := &vmckptv1.VMCheckpoint{ObjectMeta: key.meta()}
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
		c.unwritten(ctx, o, key, err, "a checkpoint could not be begun")
		return
	}
	work, cancel := c.bounded(ctx, key, o.Status.StartTime, o.Spec.Timeout)
	defer cancel()
	outcome, err := c.work(work, o, key)
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
		c.unwritten(ctx, o, key, err, "the end of a checkpoint could not be written, and its image is on the claim")
		c.retries.unwritten(key)
		return
	}
	c.retries.forget(key)
	log.FromContext(ctx).Info("a checkpoint is ready", "image", outcome.image.Name, "reason", outcome.reason)
	c.event(o, eventNormal, outcome.reason, "Capture", outcome.message)
}

// outcome is an image that is whole.
type outcome struct {
	reason, message string
	image           *jobs.ImageResult
}

// work does it, from the claim to the image.
func (c *checkpoints) work(ctx context.Context, o *vmckptv1.VMCheckpoint, key taskKey) (*outcome, error) {
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
	repository, _, err := c.knownRepository(ctx, c.client, o.Namespace, o.Spec.Storage.ClaimName)
	if err != nil {
		return nil, err
	}
	progress := report(ctx, c.Agent, func(ctx context.Context, p vmckptv1.Progress) error {
		return c.writeProgress(ctx, &vmckptv1.VMCheckpoint{ObjectMeta: key.meta()}, p)
	})
	defer progress.stop()

	// An image of this name may be there: that of an agent which died before it could say so, or that of another life of the cluster.
	name := imageName(o)
	look := jobs.ImageRequest{Image: name, Verify: o.Spec.Import != nil, Sweep: o.Spec.Import == nil}
	verified := func(p jobs.VerifyProgress) {
		progress.tell(vmckptv1.Progress{Step: "verifying", DoneBytes: p.DoneBytes, TotalBytes: p.TotalBytes})
	}
	found, _, err := c.find(ctx, volume, repository, keys, look, verified)
	if jobs.CodeOf(err) == jobs.CodeNoRepository && o.Spec.Import == nil {
		// Past the cache, which may not show yet what was captured a moment ago, and has this node's alone.
		_, used, listErr := c.knownRepository(ctx, c.live, o.Namespace, o.Spec.Storage.ClaimName)
		if listErr != nil {
			return nil, listErr
		}
		if !used {
			look.Make = true
			found, _, err = c.find(ctx, volume, repository, keys, look, verified)
		}
	}
	switch {
	case err == nil && o.Spec.Import != nil:
		if err := c.checkOwner(o.Namespace, found); err != nil {
			return nil, err
		}
		return &outcome{vmckptv1.ReasonAdopted, fmt.Sprintf("image %s, taken %s, is verified", name, found.Created.Format(time.RFC3339)), found}, nil
	case err == nil && found.Attributes[attributeUID] == string(o.UID):
		return captured(found), nil
	case err == nil && found.Attributes[attributeNamespace] == o.Namespace && found.Attributes[attributeName] == o.Name &&
		found.Attributes[capture.AttributeGuest] == request.VM.Guest && found.Attributes[attributeCluster] != cluster:
		// Of the same checkpoint in another life of the cluster. In this one it would be that of an object that was deleted and made anew, whose
		// owner wants a new image.
		return &outcome{vmckptv1.ReasonAdopted, fmt.Sprintf("the claim has an image of this checkpoint already, taken %s; nothing was captured", found.Created.Format(time.RFC3339)), found}, nil
	case err == nil:
		by := "of another namespace"
		if found.Attributes[attributeNamespace] == o.Namespace {
			by = found.Attributes[attributeName]
		}
		return nil, &takenError{name, by}
	case jobs.CodeOf(err) != jobs.CodeNotFound || o.Spec.Import != nil:
		return nil, err
	}

	request.Repository = repositoryOn(volume, repository, keys.current)
	request.OtherKeys = len(keys.all) > 1
	request.Mode, request.Instant, request.Compression = modes[o.Spec.Mode], instants[o.Spec.Instant], compressions[o.Spec.Compression]
	result, err := c.o.Engine.Capture(ctx, request, func(p capture.Progress) { progress.tell(captureProgress(p)) })
	if err != nil {
		return nil, err
	}
	kind := "base"
	if result.Parent != "" {
		kind = "increment"
	}
	c.o.Metrics.captured(kind, result)
	found, err = c.o.Engine.Image(ctx, jobs.ImageRequest{Repository: request.Repository, Image: name}, nil)
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

// imageName is the name of a checkpoint's image.
func imageName(o *vmckptv1.VMCheckpoint) string {
	if o.Spec.Import != nil {
		return o.Spec.Import.Image
	}
	return o.Name
}

var instants = map[vmckptv1.Instant]capture.When{vmckptv1.InstantLate: capture.Late, vmckptv1.InstantEarly: capture.Early}

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

// fail does what is to be done about an attempt that came to nothing.
func (c *checkpoints) fail(ctx context.Context, o *vmckptv1.VMCheckpoint, key taskKey, err error) {
	code := jobs.CodeOf(err)
	// A volume that is not mounted is waited for, as a claim is that is not bound: that takes no time of the object's.
	absent := code == jobs.CodeNoRepository
	f := c.weigh(ctx, key, attempt{number: o.Status.Attempts, start: o.Status.StartTime, timeout: o.Spec.Timeout, endless: absent}, err)
	log.FromContext(ctx).Info("an attempt at a checkpoint came to nothing", "error", err.Error(), "reason", f.reason)
	if f.verdict == leave {
		return
	}
	c.o.Metrics.captures.WithLabelValues("", string(code)).Inc()
	err = change(context.WithoutCancel(ctx), c.Agent, o, c.working, func(o *vmckptv1.VMCheckpoint) bool {
		o.Status.Progress = nil
		switch {
		case f.verdict == giveBack:
			o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID, o.Status.StartTime = "", "", "", nil
		case f.verdict == retry && absent:
			o.Status.StartTime = nil
		}
		f.tell(o, c.o.Clock.Now())
		return true
	})
	if err != nil {
		c.unwritten(ctx, o, key, err, "the failure of a checkpoint could not be written")
		return
	}
	if f.verdict != retry {
		c.retries.forget(key)
	}
	c.event(o, eventWarning, f.reason, "Capture", f.message)
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
		Name: i.Name, Path: path.Join(repositoryDir, "images", i.Name), Digest: i.Digest.String(), Repository: i.Repository, Kind: kind, Parent: i.Parent, Encrypted: i.Encrypted,
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
	s.Guard = nil
	if g := c.Guard; g != nil {
		s.Guard = &vmckptv1.GuardReport{GuardedPages: int64(g.Guarded), CaughtPages: int64(g.Caught), Waits: int64(g.Faults)}
	}
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
