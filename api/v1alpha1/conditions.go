package v1alpha1

import (
	"time"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Who may write a status. While status.nodeName is empty the controller does, afterwards the agent of that node alone, until it is done or gives
// the object back by emptying the field. For an agent whose node is not ready the controller says so, in the messages alone; for one whose node is
// gone it ends the object or takes it back. Writes carry the resourceVersion that they are based on, so that of two who disagree one reads again.

// messageBytes bounds the message of a condition (metav1.Condition allows 32 KiB; tables and terminals want less).
const messageBytes = 2048

// Waiting says that the object waits or is worked on, and what for.
func (c *VMCheckpoint) Waiting(reason, message string, now time.Time) {
	progressing(&c.Status.Conditions, c.Generation, reason, message, now)
	c.settle()
}

// Succeeded says that the checkpoint is ready.
func (c *VMCheckpoint) Succeeded(reason, message string, now time.Time) {
	succeeded(&c.Status.Conditions, c.Generation, reason, message, now)
	c.Status.CompletionTime, c.Status.Progress = &metav1.Time{Time: now}, nil
	c.settle()
}

// Failed says that the checkpoint failed for good.
func (c *VMCheckpoint) Failed(reason, message string, now time.Time) {
	failed(&c.Status.Conditions, c.Generation, reason, message, now)
	c.Status.CompletionTime, c.Status.Progress = &metav1.Time{Time: now}, nil
	c.settle()
}

// Done reports whether the checkpoint is ready or has failed: nothing more becomes of it.
func (c *VMCheckpoint) Done() bool { return done(c.Status.Conditions) }

// Ready reports whether it can be restored.
func (c *VMCheckpoint) Ready() bool {
	return meta.IsStatusConditionTrue(c.Status.Conditions, ConditionReady)
}

func (c *VMCheckpoint) settle() {
	c.Status.ObservedGeneration = c.Generation
	switch stage(c.Status.Conditions, c.DeletionTimestamp) {
	case stageDeleting:
		c.Status.Phase = CheckpointDeleting
	case stageSucceeded:
		c.Status.Phase = CheckpointReady
	case stageFailed:
		c.Status.Phase = CheckpointFailed
	case stageRunning:
		c.Status.Phase = CheckpointRunning
	case stageQueued:
		c.Status.Phase = CheckpointQueued
	case stageBound:
		c.Status.Phase = CheckpointBound
	default:
		c.Status.Phase = CheckpointPending
	}
}

// Waiting says that the object waits or is worked on, and what for.
func (r *VMRestore) Waiting(reason, message string, now time.Time) {
	progressing(&r.Status.Conditions, r.Generation, reason, message, now)
	r.settle()
}

// Succeeded says that the machine is restored, whole. Who knows how long it took puts that into the status before.
func (r *VMRestore) Succeeded(reason, message string, now time.Time) {
	succeeded(&r.Status.Conditions, r.Generation, reason, message, now)
	r.SetMemoryInvalid(false, "the restore is complete", now)
	r.SetLeftStopped(false, "the restore is complete", now)
	r.finish(now)
}

// Failed says that the restore failed for good.
func (r *VMRestore) Failed(reason, message string, now time.Time) {
	failed(&r.Status.Conditions, r.Generation, reason, message, now)
	r.finish(now)
}

func (r *VMRestore) finish(now time.Time) {
	r.Status.CompletionTime, r.Status.Progress = &metav1.Time{Time: now}, nil
	// The start is of whole seconds as the API server gives it back: without a word from who measured it the duration is no finer.
	if start := r.Status.StartTime; r.Status.Duration == nil && start != nil {
		took := now.Truncate(time.Second).Sub(start.Truncate(time.Second))
		r.Status.Duration = &metav1.Duration{Duration: max(0, took)}
	}
	r.settle()
}

// SetMemoryInvalid says whether the machine stands with memory that is being overwritten, or was half.
func (r *VMRestore) SetMemoryInvalid(invalid bool, message string, now time.Time) {
	status, reason := metav1.ConditionFalse, ReasonMemoryWhole
	if invalid {
		status, reason = metav1.ConditionTrue, ReasonMemoryInvalid
	}
	set(&r.Status.Conditions, ConditionMemoryInvalid, status, r.Generation, reason, message, now)
}

// SetLeftStopped says whether the machine stands since a restore has stopped it for nothing. That it does not is said only where it did before.
func (r *VMRestore) SetLeftStopped(stopped bool, message string, now time.Time) {
	status, reason := metav1.ConditionFalse, ReasonNotStopped
	if stopped {
		status, reason = metav1.ConditionTrue, ReasonLeftStopped
	} else if meta.FindStatusCondition(r.Status.Conditions, ConditionLeftStopped) == nil {
		return
	}
	set(&r.Status.Conditions, ConditionLeftStopped, status, r.Generation, reason, message, now)
}

// Unfinished reports whether the machine was left as it cannot stay: its memory half overwritten, or stopped for nothing.
func (r *VMRestore) Unfinished() bool {
	return meta.IsStatusConditionTrue(r.Status.Conditions, ConditionMemoryInvalid) || meta.IsStatusConditionTrue(r.Status.Conditions, ConditionLeftStopped)
}

// Done reports whether the restore is complete or has failed: nothing more becomes of it.
func (r *VMRestore) Done() bool { return done(r.Status.Conditions) }

// Ready reports whether the machine was restored.
func (r *VMRestore) Ready() bool {
	return meta.IsStatusConditionTrue(r.Status.Conditions, ConditionReady)
}

func (r *VMRestore) settle() {
	r.Status.ObservedGeneration = r.Generation
	switch stage(r.Status.Conditions, r.DeletionTimestamp) {
	case stageDeleting:
		r.Status.Phase = RestoreDeleting
	case stageSucceeded:
		r.Status.Phase = RestoreRestored
	case stageFailed:
		r.Status.Phase = RestoreFailed
	case stageRunning:
		r.Status.Phase = RestoreRunning
	case stageQueued:
		r.Status.Phase = RestoreQueued
	case stageBound:
		r.Status.Phase = RestoreBound
	default:
		r.Status.Phase = RestorePending
	}
}

// stage is what conditions say in one word.
func stage(conditions []metav1.Condition, deleted *metav1.Time) stageWord {
	switch {
	case deleted != nil:
		return stageDeleting
	case meta.IsStatusConditionTrue(conditions, ConditionReady):
		return stageSucceeded
	case meta.IsStatusConditionTrue(conditions, ConditionStalled):
		return stageFailed
	}
	if p := meta.FindStatusCondition(conditions, ConditionProgressing); p != nil {
		switch p.Reason {
		case ReasonRunning:
			return stageRunning
		case ReasonQueued, ReasonRetrying:
			return stageQueued
		case ReasonBound:
			return stageBound
		}
	}
	return stagePending
}

type stageWord int

const (
	stagePending stageWord = iota
	stageBound
	stageQueued
	stageRunning
	stageSucceeded
	stageFailed
	stageDeleting
)

func progressing(conditions *[]metav1.Condition, generation int64, reason, message string, now time.Time) {
	set(conditions, ConditionReady, metav1.ConditionFalse, generation, reason, message, now)
	set(conditions, ConditionProgressing, metav1.ConditionTrue, generation, reason, message, now)
}

func succeeded(conditions *[]metav1.Condition, generation int64, reason, message string, now time.Time) {
	set(conditions, ConditionReady, metav1.ConditionTrue, generation, reason, message, now)
	set(conditions, ConditionProgressing, metav1.ConditionFalse, generation, reason, message, now)
	meta.RemoveStatusCondition(conditions, ConditionStalled)
}

func failed(conditions *[]metav1.Condition, generation int64, reason, message string, now time.Time) {
	set(conditions, ConditionReady, metav1.ConditionFalse, generation, reason, message, now)
	set(conditions, ConditionProgressing, metav1.ConditionFalse, generation, reason, message, now)
	set(conditions, ConditionStalled, metav1.ConditionTrue, generation, reason, message, now)
}

func done(conditions []metav1.Condition) bool {
	return meta.IsStatusConditionTrue(conditions, ConditionReady) || meta.IsStatusConditionTrue(conditions, ConditionStalled)
}

func set(conditions *[]metav1.Condition, kind string, status metav1.ConditionStatus, generation int64, reason, message string, now time.Time) {
	meta.SetStatusCondition(conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: bounded(message),
		ObservedGeneration: generation, LastTransitionTime: metav1.Time{Time: now},
	})
}

// bounded cuts a message at a whole character.
func bounded(message string) string {
	const mark = " …"
	if len(message) <= messageBytes {
		return message
	}
	cut := messageBytes - len(mark)
	for cut > 0 && !utf8.RuneStart(message[cut]) {
		cut--
	}
	return message[:cut] + mark
}
