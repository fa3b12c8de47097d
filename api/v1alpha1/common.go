package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// VMKind is the kind of the object that names a virtual machine.
// +kubebuilder:validation:Enum=VirtualMachine;VirtualMachineInstance
type VMKind string

const (
	// KindVirtualMachine means the VirtualMachineInstance of the same name that the VirtualMachine owns.
	KindVirtualMachine VMKind = "VirtualMachine"
	// KindVirtualMachineInstance means that VirtualMachineInstance.
	KindVirtualMachineInstance VMKind = "VirtualMachineInstance"
)

// VMReference names a virtual machine of KubeVirt's in the object's own namespace.
type VMReference struct {
	// kind is VirtualMachine or VirtualMachineInstance. A VirtualMachine stands for the running instance that it owns.
	// +kubebuilder:default=VirtualMachine
	// +optional
	Kind VMKind `json:"kind,omitempty"`

	// name is the name of the VirtualMachine or VirtualMachineInstance.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +required
	Name string `json:"name"`
}

// Types of conditions.
const (
	// ConditionReady is true once the object is what it was made for: the checkpoint can be restored, the restore is complete. Until then it is
	// false, and its reason and message say what is waited for or what went wrong.
	ConditionReady = "Ready"

	// ConditionProgressing is true while somebody works on the object or it waits for something that can still come. It is false in the end,
	// whichever that is.
	ConditionProgressing = "Progressing"

	// ConditionStalled is true when the object failed and nothing more will be tried. Tools that follow the kstatus conventions take it for
	// a failure. It is absent otherwise.
	ConditionStalled = "Stalled"

	// ConditionMemoryInvalid, of a restore, is true from when it begins to overwrite the virtual machine's memory until all of it is right: the
	// machine stands paused and must not run. Where the restore was torn, another one finishes it, or the machine is stopped.
	ConditionMemoryInvalid = "MemoryInvalid"

	// ConditionLeftStopped, of a restore, is true when it stopped the virtual machine, wrote nothing to it and could not let it go on: the machine
	// stands paused as it was. It is absent of a restore to which that never happened.
	ConditionLeftStopped = "LeftStopped"
)

// Reasons of conditions, beside those of failures.
const (
	ReasonPending      = "Pending"      // nobody has looked at it yet
	ReasonWaitingForVM = "WaitingForVM" // the virtual machine is not there, or not running
	ReasonMigrating    = "Migrating"    // it is being migrated; tried again afterwards
	ReasonClaim        = "ClaimNotReady"
	ReasonNode         = "NodeNotReady"   // that of the machine, or any that could do it
	ReasonRestoring    = "RestorePending" // a restore of the same machine comes first
	ReasonWaiting      = "WaitingForCheckpoint"
	ReasonBound        = "Bound"  // to a node, whose agent has not taken it yet
	ReasonQueued       = "Queued" // at the agent, behind others
	ReasonRunning      = "Running"
	ReasonRetrying     = "Retrying" // an attempt failed, another follows
	ReasonDeleting     = "Deleting"

	ReasonCaptured = "Captured"
	ReasonAdopted  = "Adopted" // the image was on the claim already
	ReasonRestored = "Restored"
)

// Reasons of failures. Others are the node agent's codes in upper camel case, listed in docs/operation.md.
const (
	ReasonTimeout       = "Timeout"
	ReasonRefused       = "Refused"  // the machine cannot be captured truly
	ReasonVMGone        = "VMGone"   // it ended, or was moved, in the middle
	ReasonNodeGone      = "NodeGone" // the node is no longer of the cluster
	ReasonMemoryInvalid = "MemoryInvalid"
	ReasonMemoryWhole   = "MemoryWhole"
	ReasonLeftStopped   = "LeftStopped"
	ReasonNotStopped    = "NotStopped"
)

// Finalizer keeps an object until its image is dealt with.
const Finalizer = "vmckpt.io/image"

// ImageRef names an image in the repository on a claim.
type ImageRef struct {
	// claimName is the PersistentVolumeClaim, in the object's own namespace, on which the repository lies.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +required
	ClaimName string `json:"claimName"`

	// image is the name of the image in the repository: that of the checkpoint which made it.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`
	// +required
	Image string `json:"image"`
}

// Progress is how far the work at hand has come. It is told once a second at most.
type Progress struct {
	// step is what is being done: of a checkpoint preparing, copying, instant, writing or sealing; of a restore reading, examining, writing
	// memory, loading the device state or comparing.
	// +kubebuilder:validation:MaxLength=64
	// +optional
	Step string `json:"step,omitempty"`

	// doneBytes of totalBytes of memory have been dealt with in this step.
	// +kubebuilder:validation:Minimum=0
	// +optional
	DoneBytes int64 `json:"doneBytes"`

	// totalBytes is 0 where the step has no such number.
	// +kubebuilder:validation:Minimum=0
	// +optional
	TotalBytes int64 `json:"totalBytes"`

	// storedBytes have been written to the volume.
	// +kubebuilder:validation:Minimum=0
	// +optional
	StoredBytes int64 `json:"storedBytes,omitempty"`

	// time is when this was told.
	// +optional
	Time metav1.Time `json:"time,omitzero"`
}
