// Package cached says what the manager keeps in memory of the objects that it watches: of a large cluster's machines and nodes only what the
// controllers look at.
package cached

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache"
)

// Options are those of the manager's cache. What it drops is never to be written back: of these kinds the controllers write none but checkpoints
// and restores, which lose the managed fields alone, and an update without them leaves them as they are.
func Options() cache.Options { return cache.Options{DefaultTransform: drop} }

func drop(in any) (any, error) {
	o, err := meta.Accessor(in)
	if err != nil {
		return in, nil // the mark of an object that went unseen
	}
	o.SetManagedFields(nil)
	switch o := in.(type) {
	case *kubevirtv1.VirtualMachine:
		o.Annotations, o.Spec, o.Status = nil, kubevirtv1.VirtualMachineSpec{}, kubevirtv1.VirtualMachineStatus{}
	case *kubevirtv1.VirtualMachineInstance:
		o.Annotations = nil
		o.Spec = kubevirtv1.VirtualMachineInstanceSpec{Domain: kubevirtv1.DomainSpec{
			Devices: kubevirtv1.Devices{
				HostDevices: o.Spec.Domain.Devices.HostDevices, GPUs: o.Spec.Domain.Devices.GPUs,
				Interfaces: o.Spec.Domain.Devices.Interfaces, Filesystems: o.Spec.Domain.Devices.Filesystems,
			},
			LaunchSecurity: o.Spec.Domain.LaunchSecurity,
		}}
		o.Status = kubevirtv1.VirtualMachineInstanceStatus{
			NodeName: o.Status.NodeName, Phase: o.Status.Phase, Conditions: o.Status.Conditions,
			MigrationState: o.Status.MigrationState, Memory: o.Status.Memory,
		}
	case *corev1.Node:
		o.Annotations = nil
		o.Spec = corev1.NodeSpec{Unschedulable: o.Spec.Unschedulable}
		o.Status = corev1.NodeStatus{Conditions: o.Status.Conditions}
	}
	return in, nil
}
