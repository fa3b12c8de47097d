// Package claim looks at the PersistentVolumeClaim on which a request's repository lies.
package claim

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/node"
	"github.com/vmckpt/vmckpt/controllers/verdict"
)

// Usable returns the volume of a claim that can hold a repository.
func Usable(ctx context.Context, r client.Reader, name types.NamespacedName) (*corev1.PersistentVolume, *verdict.Verdict, error) {
	wait := func(text string, args ...any) (*corev1.PersistentVolume, *verdict.Verdict, error) {
		return nil, verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf("claim "+name.String()+" "+text, args...)), nil
	}
	var pvc corev1.PersistentVolumeClaim
	if err := r.Get(ctx, name, &pvc); apierrors.IsNotFound(err) {
		return wait("is not there")
	} else if err != nil {
		return nil, nil, fmt.Errorf("read claim %v: %w", name, err)
	}
	switch {
	case pvc.DeletionTimestamp != nil:
		return wait("is being deleted")
	case pvc.Status.Phase == corev1.ClaimLost:
		return wait("has lost its volume")
	case pvc.Status.Phase != corev1.ClaimBound || pvc.Spec.VolumeName == "":
		why, err := unbound(ctx, r, &pvc)
		if err != nil {
			return nil, nil, err
		}
		return wait("%s", why)
	case pvc.Spec.VolumeMode != nil && *pvc.Spec.VolumeMode == corev1.PersistentVolumeBlock:
		return nil, verdict.Refuse(vmckptv1.ReasonClaim, fmt.Sprintf("claim %v is a block device, and images need a file system (volumeMode Filesystem)", name)), nil
	}
	var pv corev1.PersistentVolume
	if err := r.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv); apierrors.IsNotFound(err) {
		return wait("has a volume that is gone (%s)", pvc.Spec.VolumeName)
	} else if err != nil {
		return nil, nil, fmt.Errorf("read volume %s: %w", pvc.Spec.VolumeName, err)
	}
	// A claim says of itself which volume it has; whether it has it says the volume.
	if ref := pv.Spec.ClaimRef; ref == nil || ref.Namespace != pvc.Namespace || ref.Name != pvc.Name || ref.UID != pvc.UID {
		return wait("has a volume that belongs to another claim (%s)", pv.Name)
	}
	// What the node agent reaches: it would find out no sooner than on the node, and its image could not be removed from there either.
	if pv.Spec.Local == nil && pv.Spec.HostPath == nil {
		return nil, verdict.Refuse(vmckptv1.ReasonClaim, fmt.Sprintf(
			"claim %v lies on volume %s, which is %s: images can be only on volumes of the kinds local and hostPath", name, pv.Name, kind(&pv))), nil
	}
	return &pv, nil, nil
}

// kind is that of a volume, in words.
func kind(pv *corev1.PersistentVolume) string {
	switch s := pv.Spec.PersistentVolumeSource; {
	case s.CSI != nil:
		return "of the CSI driver " + s.CSI.Driver
	case s.NFS != nil:
		return "of the kind nfs"
	}
	return "of another kind"
}

// unbound says what a claim waits for that has no volume yet.
func unbound(ctx context.Context, r client.Reader, pvc *corev1.PersistentVolumeClaim) (string, error) {
	const plain = "is not bound to a volume yet"
	if pvc.Spec.StorageClassName == nil || *pvc.Spec.StorageClassName == "" || pvc.Spec.VolumeName != "" {
		return plain, nil
	}
	var class storagev1.StorageClass
	name := *pvc.Spec.StorageClassName
	if err := r.Get(ctx, types.NamespacedName{Name: name}, &class); apierrors.IsNotFound(err) {
		return fmt.Sprintf("%s, and there is no storage class %s", plain, name), nil
	} else if err != nil {
		return "", fmt.Errorf("read storage class %s: %w", name, err)
	}
	if m := class.VolumeBindingMode; m != nil && *m == storagev1.VolumeBindingWaitForFirstConsumer {
		return fmt.Sprintf("%s: storage class %s makes one when the first pod uses the claim (WaitForFirstConsumer). "+
			"Start a pod that mounts it, on the node of the virtual machine if the volume is to lie there; the pod may end then", plain, name), nil
	}
	return plain, nil
}

// reaches says whether a volume can be used on a node: what its node affinity allows.
func reaches(pv *corev1.PersistentVolume, node *corev1.Node) (bool, error) {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return true, nil
	}
	selector, err := nodeaffinity.NewNodeSelector(pv.Spec.NodeAffinity.Required)
	if err != nil {
		return false, fmt.Errorf("node affinity of volume %s: %w", pv.Name, err)
	}
	return selector.Match(node), nil
}

// OnNode is the verdict on using a claim's volume on the node where the machine is.
func OnNode(name types.NamespacedName, pv *corev1.PersistentVolume, node *corev1.Node) (*verdict.Verdict, error) {
	ok, err := reaches(pv, node)
	if ok || err != nil {
		return nil, err
	}
	return verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf("claim %v lies on a volume that cannot be reached from node %s, where the virtual machine is (volume %s is for %s)", name, node.Name, pv.Name, where(pv))), nil
}

// AnyNode returns a node on which a claim's volume can be used, for work that needs no machine: the same one as long as the nodes are as they are,
// and one that is being emptied only where there is no other. A verdict with [vmckptv1.ReasonNode] says that there are such nodes, and none is ready.
// Where the work was bound to a node before, that one is gone.
func AnyNode(ctx context.Context, r client.Reader, name types.NamespacedName, pv *corev1.PersistentVolume, gone string) (string, *verdict.Verdict, error) {
	var nodes corev1.NodeList
	if err := r.List(ctx, &nodes, client.HasLabels{kubeVirtSchedulable}); err != nil {
		return "", nil, fmt.Errorf("list the nodes: %w", err)
	}
	// A directory of the only node that there ever was needs no such word.
	if pv.Spec.HostPath != nil && pv.Spec.NodeAffinity == nil && (len(nodes.Items) > 1 || gone != "") {
		return "", verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf(
			"claim %v lies on a directory of a node (volume %s, hostPath), and the volume does not say of which: give it nodeAffinity for the node that has the images", name, pv.Name)), nil
	}
	var best *corev1.Node
	var away []string
	for i := range nodes.Items {
		n := &nodes.Items[i]
		ok, err := reaches(pv, n)
		switch {
		case err != nil:
			return "", nil, err
		case !ok:
		case !node.Ready(n) || n.Labels[kubeVirtSchedulable] != "true":
			away = append(away, n.Name)
		case best == nil || best.Spec.Unschedulable && !n.Spec.Unschedulable ||
			best.Spec.Unschedulable == n.Spec.Unschedulable && n.Name < best.Name:
			best = n
		}
	}
	switch {
	case best != nil:
		return best.Name, nil, nil
	case away != nil:
		slices.Sort(away)
		return "", verdict.Wait(vmckptv1.ReasonNode, fmt.Sprintf("no node that reaches the volume of claim %v is ready (%s)", name, strings.Join(away, ", "))), nil
	}
	return "", verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf("no node that runs virtual machines reaches the volume of claim %v", name)), nil
}

// kubeVirtSchedulable is the label of nodes on which KubeVirt runs machines, and where the agents are. KubeVirt makes it false while a node does not
// answer it.
const kubeVirtSchedulable = "kubevirt.io/schedulable"

// where says in words for which nodes a volume is.
func where(pv *corev1.PersistentVolume) string {
	var terms []string
	for _, t := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range t.MatchExpressions {
			terms = append(terms, fmt.Sprintf("%s %s %s", e.Key, e.Operator, strings.Join(e.Values, ",")))
		}
	}
	return strings.Join(terms, " or ")
}
