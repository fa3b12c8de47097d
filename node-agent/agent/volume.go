package agent

import (
	"context"
	"fmt"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Volumes finds the volume of a claim in this node's file system.
type Volumes interface {
	// Path returns the directory where the volume can be written to. A [*VolumeError] says that it cannot be, for now or for good.
	Path(ctx context.Context, claim types.NamespacedName) (string, error)
}

// VolumeError says why a claim's volume cannot be used on this node.
type VolumeError struct {
	Claim   types.NamespacedName
	Why     string
	Missing bool // there is no such claim, or its volume is gone
}

func (e *VolumeError) Error() string { return fmt.Sprintf("claim %v: %s", e.Claim, e.Why) }

// LocalVolumes finds volumes that lie in the node's own file system: PersistentVolumes of the kinds local and hostPath, which only who
// administers the cluster can make.
type LocalVolumes struct {
	Reader client.Reader
	Root   string // the node's root directory as this process sees it; "" is "/"
}

// Path implements [Volumes].
func (v LocalVolumes) Path(ctx context.Context, claim types.NamespacedName) (string, error) {
	fail := func(why string, args ...any) (string, error) {
		return "", &VolumeError{Claim: claim, Why: fmt.Sprintf(why, args...)}
	}
	var pvc corev1.PersistentVolumeClaim
	if err := v.Reader.Get(ctx, claim, &pvc); apierrors.IsNotFound(err) {
		return "", &VolumeError{Claim: claim, Why: "there is none of that name", Missing: true}
	} else if err != nil {
		return "", fmt.Errorf("read claim %v: %w", claim, err)
	}
	if pvc.Status.Phase != corev1.ClaimBound || pvc.Spec.VolumeName == "" {
		return fail("it is not bound to a volume (phase %s)", pvc.Status.Phase)
	}
	if pvc.Spec.VolumeMode != nil && *pvc.Spec.VolumeMode != corev1.PersistentVolumeFilesystem {
		return fail("it is a block device, and images need a file system")
	}
	var pv corev1.PersistentVolume
	if err := v.Reader.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv); apierrors.IsNotFound(err) {
		return "", &VolumeError{Claim: claim, Why: fmt.Sprintf("its volume %s is gone", pvc.Spec.VolumeName), Missing: true}
	} else if err != nil {
		return "", fmt.Errorf("read volume %s of claim %v: %w", pvc.Spec.VolumeName, claim, err)
	}
	// A claim says of itself which volume it has; whether it has it says the volume.
	if ref := pv.Spec.ClaimRef; ref == nil || ref.Namespace != claim.Namespace || ref.Name != claim.Name || ref.UID != pvc.UID {
		return fail("volume %s belongs to another claim", pv.Name)
	}
	var path string
	switch {
	case pv.Spec.Local != nil:
		path = pv.Spec.Local.Path
	case pv.Spec.HostPath != nil:
		path = pv.Spec.HostPath.Path
	default:
		return fail("volume %s is of a kind that cannot be reached yet: it has to be local or hostPath", pv.Name)
	}
	if !filepath.IsAbs(path) {
		return fail("the path of its volume %s is not absolute", pv.Name)
	}
	return filepath.Join("/", v.Root, filepath.Clean(path)), nil
}
