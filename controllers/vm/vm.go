// Package vm looks at the virtual machine that a request is about, as KubeVirt's objects show it.
//
// In go a reference and a reader; out comes the running instance, or the verdict that stands against it. What only QEMU knows, the node agent
// sees later: here is refused what is certain already, so that nobody has to wait for a node to learn it.
package vm

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/verdict"
)

// Running returns the instance that ref means, if it runs on a node and stays there.
func Running(ctx context.Context, r client.Reader, namespace string, ref vmckptv1.VMReference) (*kubevirtv1.VirtualMachineInstance, *verdict.Verdict, error) {
	vmi, v, err := find(ctx, r, types.NamespacedName{Namespace: namespace, Name: ref.Name}, ref.Kind)
	if v != nil || err != nil {
		return nil, v, err
	}
	name := fmt.Sprintf("virtual machine %s/%s", namespace, ref.Name)
	switch {
	case vmi.DeletionTimestamp != nil:
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, name+" is being stopped"), nil
	case vmi.Status.Phase != kubevirtv1.Running:
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, fmt.Sprintf("%s does not run yet (phase %s)", name, orPending(vmi.Status.Phase))), nil
	case vmi.Status.NodeName == "":
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, name+" is on no node yet"), nil
	case Migrating(vmi):
		return nil, verdict.Wait(vmckptv1.ReasonMigrating, name+" is being migrated to another node"), nil
	}
	return vmi, nil, nil
}

func orPending(p kubevirtv1.VirtualMachineInstancePhase) kubevirtv1.VirtualMachineInstancePhase {
	if p == "" {
		return kubevirtv1.Pending
	}
	return p
}

// find reads the instance. That of a VirtualMachine has its name, and is owned by it.
func find(ctx context.Context, r client.Reader, name types.NamespacedName, kind vmckptv1.VMKind) (*kubevirtv1.VirtualMachineInstance, *verdict.Verdict, error) {
	var owner *kubevirtv1.VirtualMachine
	if kind == vmckptv1.KindVirtualMachine {
		owner = &kubevirtv1.VirtualMachine{}
		if err := r.Get(ctx, name, owner); apierrors.IsNotFound(err) {
			return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, fmt.Sprintf("there is no virtual machine %v", name)), nil
		} else if err != nil {
			return nil, nil, fmt.Errorf("read VirtualMachine %v: %w", name, err)
		}
	}
	vmi := &kubevirtv1.VirtualMachineInstance{}
	if err := r.Get(ctx, name, vmi); apierrors.IsNotFound(err) {
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, fmt.Sprintf("virtual machine %v does not run", name)), nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("read VirtualMachineInstance %v: %w", name, err)
	}
	if owner != nil && !metav1.IsControlledBy(vmi, owner) {
		return nil, verdict.Wait(vmckptv1.ReasonWaitingForVM, fmt.Sprintf("VirtualMachineInstance %v does not belong to the VirtualMachine of that name", name)), nil
	}
	return vmi, nil, nil
}

// Migrating reports whether KubeVirt is moving the instance to another node.
func Migrating(vmi *kubevirtv1.VirtualMachineInstance) bool {
	m := vmi.Status.MigrationState
	return m != nil && !m.Completed && !m.Failed
}

// Paused reports whether somebody paused the instance by KubeVirt, or started it so.
func Paused(vmi *kubevirtv1.VirtualMachineInstance) bool {
	return slices.ContainsFunc(vmi.Status.Conditions, func(c kubevirtv1.VirtualMachineInstanceCondition) bool {
		return c.Type == kubevirtv1.VirtualMachineInstancePaused && c.Status == corev1.ConditionTrue
	})
}

// Capturable refuses an instance of which it is certain that it cannot be captured truly, with all the reasons. The agent refuses the same
// shapes by what QEMU has (package qemu, refusedDevices).
func Capturable(vmi *kubevirtv1.VirtualMachineInstance) *verdict.Verdict {
	var why []string
	devices := &vmi.Spec.Domain.Devices
	for _, d := range devices.HostDevices {
		why = append(why, fmt.Sprintf("host device %s is %s", d.Name, passedThrough(d.DeviceName, d.ClaimRequest)))
	}
	for _, g := range devices.GPUs {
		why = append(why, fmt.Sprintf("GPU %s is %s", g.Name, passedThrough(g.DeviceName, g.ClaimRequest)))
	}
	for _, i := range devices.Interfaces {
		if i.SRIOV != nil {
			why = append(why, fmt.Sprintf("interface %s is SR-IOV, hardware that writes its memory", i.Name))
		}
	}
	for _, f := range devices.Filesystems {
		if f.Virtiofs != nil {
			why = append(why, fmt.Sprintf("file system %s is shared by virtiofs, whose daemon writes its memory", f.Name))
		}
	}
	if s := vmi.Spec.Domain.LaunchSecurity; s != nil {
		why = append(why, "its memory is encrypted by the processor (launchSecurity)")
	}
	// KubeVirt fills in memory.maxGuest by itself, as room to grow. There is a memory device only once memory was plugged.
	if m := vmi.Status.Memory; m != nil && m.GuestAtBoot != nil && m.GuestCurrent != nil && m.GuestCurrent.Cmp(*m.GuestAtBoot) > 0 {
		why = append(why, fmt.Sprintf("memory was plugged while it ran (%v at its start, %v now), and memory devices are not supported", m.GuestAtBoot, m.GuestCurrent))
	}
	if len(why) == 0 {
		return nil
	}
	return verdict.Refuse(vmckptv1.ReasonRefused, fmt.Sprintf("virtual machine %s/%s cannot be captured truly: %s", vmi.Namespace, vmi.Name, strings.Join(why, "; ")))
}

// passedThrough says what a device is and why it is refused, whatever its bus is: KubeVirt's object does not show that.
func passedThrough(resource string, claim *kubevirtv1.ClaimRequest) string {
	if resource == "" && claim != nil {
		resource = "of resource claim " + claim.ClaimName
	}
	return fmt.Sprintf("hardware of the node (%s): its state cannot be saved, and on PCI it writes the guest's memory unseen", resource)
}
