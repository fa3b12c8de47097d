package checkpoint_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	kubevirtv1 "kubevirt.io/api/core/v1"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestRoomToGrow is no reason to refuse a machine: KubeVirt gives it to every one that can have it. Memory that was plugged is.
func TestRoomToGrow(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.claim("claim", "")
	atBoot, plugged, most := resource.MustParse("1Gi"), resource.MustParse("2Gi"), resource.MustParse("4Gi")
	for name, now := range map[string]resource.Quantity{"room": atBoot, "plugged": plugged} {
		r.instance(name, func(vmi *kubevirtv1.VirtualMachineInstance) {
			vmi.Spec.Domain.Memory = &kubevirtv1.Memory{Guest: &now, MaxGuest: &most}
			vmi.Status.Memory = &kubevirtv1.MemoryStatus{GuestAtBoot: &atBoot, GuestCurrent: &now, GuestRequested: &now}
		})
	}
	of := func(name string) func(*vmckptv1.VMCheckpoint) {
		return func(c *vmckptv1.VMCheckpoint) { c.Spec.Source.Name = name }
	}
	r.says(r.checkpoint("first", of("room")), vmckptv1.ReasonBound, "")
	r.says(r.checkpoint("second", of("plugged")), vmckptv1.ReasonRefused, "memory was plugged while it ran (1Gi at its start, 2Gi now)")
}

// TestLongRefusal has an event, although the API server takes none with a note as long as the condition's message.
func TestLongRefusal(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) {
		for i := range 20 {
			vmi.Spec.Domain.Devices.Filesystems = append(vmi.Spec.Domain.Devices.Filesystems,
				kubevirtv1.Filesystem{Name: fmt.Sprintf("share-number-%d", i), Virtiofs: &kubevirtv1.FilesystemVirtiofs{}})
		}
	})
	c := r.checkpoint("first", nil)
	r.says(c, vmckptv1.ReasonRefused, "share-number-19")
	r.event(c, corev1.EventTypeWarning, " …")
}
