// Package claim looks at the PersistentVolumeClaim on which a request's repository lies.
package claim

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
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
		return wait("is not bound to a volume yet; one of a class that waits for its first consumer is bound when a pod uses it")
	case pvc.Spec.VolumeMode != nil && *pvc.Spec.VolumeMode == corev1.PersistentVolumeBlock:
		return nil, verdict.Refuse(vmckptv1.ReasonClaim, fmt.Sprintf("claim %v is a block device, and images need a file system (volumeMode Filesystem)", name)), nil
	}
	var pv corev1.PersistentVolume
	if err := r.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv); apierrors.IsNotFound(err) {
		return wait("has a volume that is gone (%s)", pvc.Spec.VolumeName)
	} else if err != nil {
		return nil, nil, fmt.Errorf("read volume %s: %w", pvc.Spec.VolumeName, err)
	}
	return &pv, nil, nil
}

// Reaches says whether a volume can be used on a node: what its node affinity allows.
func Reaches(ctx context.Context, r client.Reader, pv *corev1.PersistentVolume, nodeName string) (bool, error) {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return true, nil
	}
	var node corev1.Node
	if err := r.Get(ctx, types.NamespacedName{Name: nodeName}, &node); apierrors.IsNotFound(err) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("read node %s: %w", nodeName, err)
	}
	selector, err := nodeaffinity.NewNodeSelector(pv.Spec.NodeAffinity.Required)
	if err != nil {
		return false, fmt.Errorf("node affinity of volume %s: %w", pv.Name, err)
	}
	return selector.Match(&node), nil
}

// OnNode is the verdict on using a volume on the node where the machine is.
func OnNode(ctx context.Context, r client.Reader, name types.NamespacedName, pv *corev1.PersistentVolume, nodeName string) (*verdict.Verdict, error) {
	ok, err := Reaches(ctx, r, pv, nodeName)
	if ok || err != nil {
		return nil, err
	}
	return verdict.Wait(vmckptv1.ReasonClaim, fmt.Sprintf("claim %v lies on a volume that cannot be reached from node %s, where the virtual machine is (volume %s is for %s)", name, nodeName, pv.Name, where(pv))), nil
}

// AnyNode returns a node on which a volume can be used, always the same as long as the nodes are: for work that needs no machine.
func AnyNode(ctx context.Context, r client.Reader, pv *corev1.PersistentVolume) (string, error) {
	var nodes corev1.NodeList
	if err := r.List(ctx, &nodes, client.MatchingLabels{kubeVirtSchedulable: "true"}); err != nil {
		return "", fmt.Errorf("list the nodes: %w", err)
	}
	slices.SortFunc(nodes.Items, func(a, b corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range nodes.Items {
		if ok, err := Reaches(ctx, r, pv, n.Name); ok || err != nil {
			return n.Name, err
		}
	}
	return "", nil
}

// kubeVirtSchedulable is the label of nodes on which KubeVirt runs machines, and where the agents are.
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
