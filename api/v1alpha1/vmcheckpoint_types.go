package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Mode says what a checkpoint holds.
// +kubebuilder:validation:Enum=Auto;Full;Incremental
type Mode string

const (
	ModeAuto        Mode = "Auto"
	ModeFull        Mode = "Full"
	ModeIncremental Mode = "Incremental"
)

// Instant says which moment a checkpoint is of.
// +kubebuilder:validation:Enum=Late;Early
type Instant string

const (
	InstantLate  Instant = "Late"
	InstantEarly Instant = "Early"
)

// Compression is how pages are stored.
// +kubebuilder:validation:Enum=Zstd;S2;None
type Compression string

const (
	CompressionZstd Compression = "Zstd"
	CompressionS2   Compression = "S2"
	CompressionNone Compression = "None"
)

// DeletionPolicy says what becomes of the image when the object is deleted.
// +kubebuilder:validation:Enum=Delete;Retain
type DeletionPolicy string

const (
	DeletionDelete DeletionPolicy = "Delete"
	DeletionRetain DeletionPolicy = "Retain"
)

// Storage says where images are kept.
type Storage struct {
	// claimName is a PersistentVolumeClaim in the checkpoint's own namespace. The repository is the directory vmckpt on its volume, and is made
	// there if need be. Checkpoints of one virtual machine that share a claim build on each other.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +required
	ClaimName string `json:"claimName"`
}

// Import names an image that is on the claim already.
type Import struct {
	// image is its name in the repository.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`
	// +required
	Image string `json:"image"`
}

// VMCheckpointSpec says what is to be captured, and where to.
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the spec of a checkpoint cannot be changed: make another checkpoint"
// +kubebuilder:validation:XValidation:rule="!has(self.import) || self.mode == 'Auto'",message="an image that is imported is what it is: leave mode out"
type VMCheckpointSpec struct {
	// source is the virtual machine, in the checkpoint's own namespace. A checkpoint whose virtual machine is not there, or does not run,
	// waits for it.
	// +required
	Source VMReference `json:"source"`

	// storage is where the image goes.
	// +required
	Storage Storage `json:"storage"`

	// mode says what the image holds. Auto, the default, makes an increment where there is an image of the same virtual machine on the claim to
	// build on, else a base. Full makes a base: every page, whatever earlier images hold. Incremental makes an increment or fails.
	// +kubebuilder:default=Auto
	// +optional
	Mode Mode `json:"mode,omitempty"`

	// instant says which moment the image is of. Late, the default, copies memory while the guest runs and takes the instant when little is
	// left. Early takes it as soon as a node's agent begins: memory is guarded, and copied afterwards, each page at the latest when the guest is
	// about to write to it, which then waits for microseconds.
	// +kubebuilder:default=Late
	// +optional
	Instant Instant `json:"instant,omitempty"`

	// compression of the pages. Zstd, the default, makes images smallest; S2 is twice as fast or more and takes a quarter more space; None
	// suits volumes that compress by themselves.
	// +kubebuilder:default=Zstd
	// +optional
	Compression Compression `json:"compression,omitempty"`

	// deletionPolicy says what becomes of the image when this object is deleted. Delete, the default, removes it from the claim; images
	// that were made on it are not harmed. Retain leaves it: it can be imported again.
	// +kubebuilder:default=Delete
	// +optional
	DeletionPolicy DeletionPolicy `json:"deletionPolicy,omitempty"`

	// timeout is how long the checkpoint may take, from the moment that a node's agent begins with it; waiting for the virtual machine and
	// in a queue do not count. It fails then, and the guest runs on. Between 1s and 24h; the default is 30m.
	// +kubebuilder:default="30m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="timeout must be between 1s and 24h"
	// +kubebuilder:validation:Format=duration
	// +optional
	Timeout metav1.Duration `json:"timeout,omitzero"`

	// import makes this object stand for an image that is on the claim already, instead of capturing. It is verified, and need not be of a
	// virtual machine that is there.
	// +optional
	Import *Import `json:"import,omitempty"`
}

// CheckpointPhase is a word for the conditions, for people who read tables.
// +kubebuilder:validation:Enum=Pending;Bound;Queued;Running;Ready;Failed;Deleting
type CheckpointPhase string

const (
	CheckpointPending  CheckpointPhase = "Pending"
	CheckpointBound    CheckpointPhase = "Bound"
	CheckpointQueued   CheckpointPhase = "Queued"
	CheckpointRunning  CheckpointPhase = "Running"
	CheckpointReady    CheckpointPhase = "Ready"
	CheckpointFailed   CheckpointPhase = "Failed"
	CheckpointDeleting CheckpointPhase = "Deleting"
)

// ImageKind tells a base from an increment.
// +kubebuilder:validation:Enum=Base;Increment
type ImageKind string

const (
	ImageBase      ImageKind = "Base"
	ImageIncrement ImageKind = "Increment"
)

// CheckpointImage is the image that came of a checkpoint.
type CheckpointImage struct {
	// name of the image in the repository.
	// +kubebuilder:validation:MaxLength=128
	// +required
	Name string `json:"name"`

	// path is the image's directory on the claim's volume.
	// +kubebuilder:validation:MaxLength=512
	// +required
	Path string `json:"path"`

	// digest is the BLAKE3 digest of the image's manifest, which holds those of all its files: 64 hexadecimal digits.
	// +kubebuilder:validation:MaxLength=64
	// +required
	Digest string `json:"digest"`

	// repository is the id of the repository that the image lies in, by which a volume that is not mounted is told from an empty one.
	// +kubebuilder:validation:MaxLength=64
	// +optional
	Repository string `json:"repository,omitempty"`

	// kind is Base or Increment. Either is whole: nothing else is needed to restore it.
	// +required
	Kind ImageKind `json:"kind"`

	// parent is the image that an increment was made on. It may be gone since.
	// +kubebuilder:validation:MaxLength=128
	// +optional
	Parent string `json:"parent,omitempty"`

	// encrypted says whether the pages are encrypted on the volume.
	// +optional
	Encrypted bool `json:"encrypted,omitempty"`
}

// Pause is one time that the guest stood still.
type Pause struct {
	// for says what for: instant, the moment that the image is of; barrier, a drained stop before pages that were found dirty are copied.
	// +kubebuilder:validation:MaxLength=32
	// +required
	For string `json:"for"`

	// duration is how long, by QEMU's own stamps where it gave them.
	// +required
	Duration metav1.Duration `json:"duration"`

	// lost says that the attempt did not count and was repeated.
	// +optional
	Lost bool `json:"lost,omitempty"`
}

// MemoryBreakdown counts the pages of the image, 4096 bytes each, by where their content is. totalPages is the sum of unpopulatedPages,
// evictedPages, uniformPages and storedPages.
type MemoryBreakdown struct {
	// totalPages is all of the machine's memory, video memory and firmware included.
	// +required
	TotalPages int64 `json:"totalPages"`

	// unpopulatedPages were never written to, or given back to the host. They take no space and come back as zeros.
	// +required
	UnpopulatedPages int64 `json:"unpopulatedPages"`

	// uniformPages hold one word over and over, zeros most often. They take no space and come back as they were.
	// +required
	UniformPages int64 `json:"uniformPages"`

	// evictedPages held something that the guest does not need any more. They come back as zeros.
	// +required
	EvictedPages int64 `json:"evictedPages"`

	// storedPages are in files, of this image or of earlier ones that it shares them with.
	// +required
	StoredPages int64 `json:"storedPages"`

	// inheritedPages, of totalPages, are the parent's, whatever their kind.
	// +required
	InheritedPages int64 `json:"inheritedPages"`

	// unchangedPages were written to by the guest since the parent, and hold what they held.
	// +required
	UnchangedPages int64 `json:"unchangedPages"`

	// writtenPages were written into files of this image's own.
	// +required
	WrittenPages int64 `json:"writtenPages"`

	// storedBytes is what this image added to the volume for them.
	// +required
	StoredBytes int64 `json:"storedBytes"`
}

// VMCheckpointStatus says what became of a checkpoint. Only the operator writes it.
type VMCheckpointStatus struct {
	// observedGeneration is the generation that the conditions are about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// phase is a word for the conditions, for tables. Programs should look at the conditions.
	// +optional
	Phase CheckpointPhase `json:"phase,omitempty"`

	// conditions: Ready, Progressing, and Stalled once it failed for good.
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// nodeName is the node that the checkpoint is bound to: its agent alone works on it.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	NodeName string `json:"nodeName,omitempty"`

	// vmiName is the VirtualMachineInstance that is captured.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	VMIName string `json:"vmiName,omitempty"`

	// vmiUID is its uid: one of the same name that is started later is another.
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=64
	// +optional
	VMIUID types.UID `json:"vmiUID,omitempty"`

	// attempts counts the times that an agent began with it.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`

	// startTime is when the agent began with it.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`

	// instantTime is the moment that the image is of.
	// +optional
	InstantTime *metav1.MicroTime `json:"instantTime,omitempty"`

	// completionTime is when it became ready, or failed.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// duration is how long the capture took.
	// +optional
	Duration *metav1.Duration `json:"duration,omitempty"`

	// progress of the work at hand; gone when it is done.
	// +optional
	Progress *Progress `json:"progress,omitempty"`

	// image is what came of it.
	// +optional
	Image *CheckpointImage `json:"image,omitempty"`

	// size is what the image added to the volume, rounded for reading; memory.storedBytes is exact.
	// +optional
	Size *resource.Quantity `json:"size,omitempty"`

	// downtime is the sum of all pauses.
	// +optional
	Downtime *metav1.Duration `json:"downtime,omitempty"`

	// pauses are all times that the guest stood still for this checkpoint.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	// +optional
	Pauses []Pause `json:"pauses,omitempty"`

	// dirtySource says how the pages of an increment were chosen: "page tables", or "content hash", which reads all memory. Empty for a base.
	// +kubebuilder:validation:MaxLength=64
	// +optional
	DirtySource string `json:"dirtySource,omitempty"`

	// note says why the image is a base, or why the content hash was used, where that was not asked for.
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Note string `json:"note,omitempty"`

	// guard is what was copied after the instant, with the guest running; absent where nothing was.
	// +optional
	Guard *GuardReport `json:"guard,omitempty"`

	// witness is what KVM's dirty log had to say, where the node's agent has it kept.
	// +optional
	Witness *Witness `json:"witness,omitempty"`

	// memory is the breakdown of the image's pages.
	// +optional
	Memory *MemoryBreakdown `json:"memory,omitempty"`
}

// GuardReport is what was copied after the instant: with instant Early all that had changed, else what the pause had no time for.
type GuardReport struct {
	// guardedPages were copied after the instant. A page is 4096 bytes.
	GuardedPages int64 `json:"guardedPages"`

	// caughtPages are those of them that were copied because the guest was about to write to them.
	CaughtPages int64 `json:"caughtPages"`

	// waits is how many writes of the guest's waited for the guard.
	Waits int64 `json:"waits"`
}

// Witness is what KVM's dirty log had to say of the page tables by which an image was made.
type Witness struct {
	// compared says that both saw the whole time since the checkpoint before.
	Compared bool `json:"compared"`

	// missedPages are in KVM's log alone: there must be none, but for a guest that runs guests of its own. The image is right all the same.
	// +optional
	MissedPages int64 `json:"missedPages,omitempty"`

	// unseenPages are not in KVM's log: what devices wrote.
	// +optional
	UnseenPages int64 `json:"unseenPages,omitempty"`

	// nestedGuests says that the guest runs guests of its own.
	// +optional
	NestedGuests bool `json:"nestedGuests,omitempty"`

	// note says why nothing could be compared.
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Note string `json:"note,omitempty"`
}

// VMCheckpoint is a live checkpoint of a running virtual machine, memory and devices included: a request for one, and then the one that was
// taken. The guest goes on running; it stands still for some milliseconds.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vmckpt;vmckpts,categories=kubevirt
// +kubebuilder:selectablefield:JSONPath=".status.nodeName"
// +kubebuilder:printcolumn:name="VM",type=string,JSONPath=".spec.source.name"
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=".status.phase"
// +kubebuilder:printcolumn:name="Size",type=string,JSONPath=".status.size"
// +kubebuilder:printcolumn:name="Pause",type=string,JSONPath=".status.downtime"
// +kubebuilder:printcolumn:name="Parent",type=string,JSONPath=".status.image.parent"
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=".status.nodeName"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].message",priority=1
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",message="the name of a checkpoint has 63 characters at the most"
type VMCheckpoint struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says what is to be captured. It cannot be changed.
	// +required
	Spec VMCheckpointSpec `json:"spec"`

	// status says what became of it. It begins with a generation that was never observed: tools that follow the kstatus conventions would take an
	// object without any status for one that is ready.
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status VMCheckpointStatus `json:"status,omitzero"`
}

// VMCheckpointList is a list of checkpoints.
// +kubebuilder:object:root=true
type VMCheckpointList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VMCheckpoint `json:"items"`
}
