package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// RestoreSource names what is restored: one of its fields is set.
// +kubebuilder:validation:XValidation:rule="has(self.checkpointName) != has(self.volume)",message="name either a checkpoint or an image on a volume"
type RestoreSource struct {
	// checkpointName is a VMCheckpoint in the restore's own namespace. A restore waits for one that is not ready yet.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +optional
	CheckpointName string `json:"checkpointName,omitempty"`

	// volume names an image on a claim: no VMCheckpoint is needed, so a repository can be restored from in an empty cluster.
	// +optional
	Volume *ImageRef `json:"volume,omitempty"`
}

// RestoreMode says what state the virtual machine is in that is restored into.
// +kubebuilder:validation:Enum=InPlace;Paused
type RestoreMode string

const (
	// RestoreInPlace rolls back a virtual machine that is at work: it is stopped, overwritten, and goes on from the checkpoint.
	RestoreInPlace RestoreMode = "InPlace"
	// RestorePaused puts the checkpoint into a virtual machine that was started paused and has not run.
	RestorePaused RestoreMode = "Paused"
)

// RestoreTarget is the virtual machine that is restored into.
type RestoreTarget struct {
	VMReference `json:",inline"`

	// mode is Paused, the default, for a virtual machine that stands paused, as a new one does that was started so; or InPlace, which rolls back one
	// that runs, and loses all that it has done since the checkpoint.
	// +kubebuilder:default=Paused
	// +optional
	Mode RestoreMode `json:"mode,omitempty"`
}

// AfterRestore says what the guest does when it is restored.
// +kubebuilder:validation:Enum=Run;Pause
type AfterRestore string

const (
	AfterRun   AfterRestore = "Run"
	AfterPause AfterRestore = "Pause"
)

// VMRestoreSpec says what is restored into which virtual machine.
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the spec of a restore cannot be changed: make another restore"
type VMRestoreSpec struct {
	// source is what is restored.
	// +required
	Source RestoreSource `json:"source"`

	// target is what is restored into. A restore whose virtual machine is not there, or not in the state for it, waits.
	// +required
	Target RestoreTarget `json:"target"`

	// after is Run, the default: the guest goes on from the checkpoint. With Pause it stands still, restored, until it is unpaused.
	// +kubebuilder:default=Run
	// +optional
	After AfterRestore `json:"after,omitempty"`

	// timeout is how long the restore may take before it has begun to overwrite memory, from the moment that a node's agent begins with it; from
	// then on it is brought to its end. Between 1s and 24h; the default is 30m.
	// +kubebuilder:default="30m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="timeout must be between 1s and 24h"
	// +kubebuilder:validation:Format=duration
	// +optional
	Timeout metav1.Duration `json:"timeout,omitzero"`
}

// RestorePhase is a word for the conditions, for people who read tables.
// +kubebuilder:validation:Enum=Pending;Bound;Queued;Running;Restored;Failed;Deleting
type RestorePhase string

const (
	RestorePending  RestorePhase = "Pending"
	RestoreBound    RestorePhase = "Bound"
	RestoreQueued   RestorePhase = "Queued"
	RestoreRunning  RestorePhase = "Running"
	RestoreRestored RestorePhase = "Restored"
	RestoreFailed   RestorePhase = "Failed"
	RestoreDeleting RestorePhase = "Deleting"
)

// VMRestoreStatus says what became of a restore. Only the operator writes it.
type VMRestoreStatus struct {
	// observedGeneration is the generation that the conditions are about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// phase is a word for the conditions, for tables. Programs should look at the conditions.
	// +optional
	Phase RestorePhase `json:"phase,omitempty"`

	// conditions: Ready, Progressing, MemoryInvalid, LeftStopped where a machine was, and Stalled once it failed for good.
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// nodeName is the node that the restore is bound to: its agent alone works on it.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	NodeName string `json:"nodeName,omitempty"`

	// vmiName is the VirtualMachineInstance that is restored into.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	VMIName string `json:"vmiName,omitempty"`

	// vmiUID is its uid: one of the same name that is started later is another.
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=64
	// +optional
	VMIUID types.UID `json:"vmiUID,omitempty"`

	// image is what is restored, once it is known.
	// +optional
	Image *ImageRef `json:"image,omitempty"`

	// digest is that of the image's manifest: 64 hexadecimal digits.
	// +kubebuilder:validation:MaxLength=64
	// +optional
	Digest string `json:"digest,omitempty"`

	// instantTime is the moment that the guest went back to.
	// +optional
	InstantTime *metav1.MicroTime `json:"instantTime,omitempty"`

	// attempts counts the times that an agent began with it.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`

	// startTime is when the agent began with it.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`

	// completionTime is when it was restored, or failed.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// duration is how long the restore took, from the agent's beginning to its end.
	// +optional
	Duration *metav1.Duration `json:"duration,omitempty"`

	// progress of the work at hand; gone when it is done.
	// +optional
	Progress *Progress `json:"progress,omitempty"`

	// warnings are what came to light and is not in the way.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=1024
	// +optional
	Warnings []string `json:"warnings,omitempty"`
}

// VMRestore puts a checkpoint's memory and device state into a virtual machine, which goes on from there. It is done once; to do it again,
// make another.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vmrest,categories=kubevirt
// +kubebuilder:selectablefield:JSONPath=".status.nodeName"
// +kubebuilder:printcolumn:name="VM",type=string,JSONPath=".spec.target.name"
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=".status.phase"
// +kubebuilder:printcolumn:name="Image",type=string,JSONPath=".status.image.image"
// +kubebuilder:printcolumn:name="Took",type=string,JSONPath=".status.duration"
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=".status.nodeName"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].message",priority=1
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",message="the name of a restore has 63 characters at the most"
type VMRestore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says what is restored. It cannot be changed.
	// +required
	Spec VMRestoreSpec `json:"spec"`

	// status says what became of it. It begins with a generation that was never observed: tools that follow the kstatus conventions would take an
	// object without any status for one that is ready.
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status VMRestoreStatus `json:"status,omitzero"`
}

// VMRestoreList is a list of restores.
// +kubebuilder:object:root=true
type VMRestoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VMRestore `json:"items"`
}
