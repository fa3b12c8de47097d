package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// deleted brings a checkpoint to its end that was deleted: its work ended, its image removed or left as it wants, its finalizer taken off.
func (c *checkpoints) deleted(ctx context.Context, o *vmckptv1.VMCheckpoint, key taskKey) (ctrl.Result, error) {
	if c.queue.cancel(key, errDeleted) {
		return ctrl.Result{}, nil // the end of the task brings it here again
	}
	c.retries.forget(key)
	if !controllerutil.ContainsFinalizer(o, vmckptv1.Finalizer) {
		return ctrl.Result{}, nil
	}
	// Failures of the removal are counted by themselves: those of the capture do not hold it up.
	key.kind = "removal of VMCheckpoint"
	if wait := c.retries.left(key, c.o.Clock.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
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
	return ctrl.Result{}, c.letGo(ctx, o)
}

// removeImage removes the image of a checkpoint, unless another object stands for it too.
func (c *checkpoints) removeImage(ctx context.Context, o *vmckptv1.VMCheckpoint) error {
	name := imageName(o)
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
	repository := ""
	if o.Status.Image != nil {
		repository = o.Status.Image.Repository
	}
	found, keyFile, err := c.find(ctx, volume, repository, keys, jobs.ImageRequest{Image: name}, nil)
	switch code := jobs.CodeOf(err); {
	case err == nil && o.Status.Image == nil && found.Attributes[attributeUID] != string(o.UID):
		return nil // of another checkpoint: this one has made none
	case err == nil && o.Status.Image != nil && found.Digest.String() != o.Status.Image.Digest:
		return nil // another has taken its name since
	case err == nil && c.checkOwner(o.Namespace, found) != nil:
		c.event(o, eventWarning, reasonOtherNamespace, "Delete", fmt.Sprintf("image %s stays: it is not of a machine of this namespace", name))
		return nil
	case err == nil:
	case code == jobs.CodeNotFound, code == jobs.CodeNoRepository && o.Status.Image == nil:
		return nil
	case code == jobs.CodeDamaged && o.Status.Image != nil:
		keyFile = keys.current // damaged or not, it is this object's
	default:
		return err
	}
	err = c.o.Engine.Delete(ctx, jobs.DeleteRequest{Repository: repositoryOn(volume, repository, keyFile), Image: name})
	if jobs.CodeOf(err) == jobs.CodeNotFound {
		return nil
	}
	return err
}
