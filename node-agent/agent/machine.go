package agent

import (
	kubevirtv1 "kubevirt.io/api/core/v1"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// machineOf says which process is an instance's QEMU: KubeVirt names it NAMESPACE_NAME (virt-launcher's api.VMINamespaceKeyFunc), and gives it
// the uuid of the instance's firmware.
func machineOf(vmi *kubevirtv1.VirtualMachineInstance) jobs.VM {
	vm := jobs.VM{Guest: guestName(vmi.Namespace, vmi.Name)}
	if f := vmi.Spec.Domain.Firmware; f != nil {
		vm.UUID = string(f.UUID)
	}
	return vm
}

func guestName(namespace, vmi string) string { return namespace + "_" + vmi }
