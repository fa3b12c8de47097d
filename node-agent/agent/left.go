package agent

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// howLeft is how restores have left a machine, by the node's own notes: they hold whatever becomes of the object.
func (r *restores) howLeft(ctx context.Context, o *vmckptv1.VMRestore) (jobs.Left, error) {
	return jobs.HowLeft(ctx, jobs.VM{Guest: guestName(o.Namespace, o.Status.VMIName)}, r.o.RecordDir)
}

// What is to be done about a machine that was left as it cannot stay.
const (
	adviceInvalid = "the virtual machine's memory is half overwritten; it stands paused and must not run: only a restore makes it whole, of any checkpoint of it, or it is stopped"
	adviceStopped = "the virtual machine was stopped for the restore, was not written to, and could not be let go on: unless somebody has unpaused it, it stands paused as it was. " +
		"Another restore rolls it back; to have it go on as it is, unpause it (virtctl unpause vmi NAME)"
)

// advice is the reason and the words for it; both are empty where nothing is to be done.
func advice(left jobs.Left) (reason, text string) {
	switch {
	case left.MemoryInvalid:
		return vmckptv1.ReasonMemoryInvalid, adviceInvalid
	case left.Stopped:
		return vmckptv1.ReasonLeftStopped, adviceStopped
	}
	return "", ""
}

// say puts how a machine was left into the conditions. What was never said to be bad is not said to be good.
func say(o *vmckptv1.VMRestore, left jobs.Left, now time.Time) {
	const whole = "the virtual machine was put right since, or is gone"
	switch {
	case left.MemoryInvalid:
		o.SetMemoryInvalid(true, adviceInvalid, now)
	case meta.IsStatusConditionTrue(o.Status.Conditions, vmckptv1.ConditionMemoryInvalid):
		o.SetMemoryInvalid(false, whole, now)
	}
	if left.Stopped {
		o.SetLeftStopped(true, adviceStopped, now)
	} else {
		o.SetLeftStopped(false, whole, now)
	}
}

// madeWhole says of other restores that had left the machine as it could not stay, and were given up, that this one has put it right.
func (r *restores) madeWhole(ctx context.Context, by *vmckptv1.VMRestore) {
	var list vmckptv1.VMRestoreList
	if err := r.client.List(ctx, &list, client.InNamespace(by.Namespace)); err != nil {
		log.FromContext(ctx).Error(err, "list the restores of a machine that was restored")
		return
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.UID == by.UID || o.Status.VMIUID != by.Status.VMIUID || !o.Done() || !o.Unfinished() {
			continue
		}
		err := change(ctx, r.Agent, o, r.ours, func(o *vmckptv1.VMRestore) bool {
			say(o, jobs.Left{}, r.o.Clock.Now())
			return true
		})
		if ignoreNotOurs(err) != nil {
			log.FromContext(ctx).Error(err, "a machine's other restore could not be told that it is whole", "restore", o.Name)
		}
	}
}

// warnMachine tells of a machine that was left as it cannot stay, at its instance, where those look who have to do with it.
func (r *restores) warnMachine(ctx context.Context, o *vmckptv1.VMRestore, reason, action, text string) {
	vmi, err := r.findVMI(context.WithoutCancel(ctx), types.NamespacedName{Namespace: o.Namespace, Name: o.Status.VMIName}, o.Status.VMIUID)
	if err != nil {
		log.FromContext(ctx).Info("an instance cannot be told how it was left", "error", err.Error())
		return
	}
	r.event(vmi, eventWarning, reason, action, text)
}
