// Package operator tests the operator as it ships: the manager's and the node agent's programs, as processes with the rights of their service
// accounts and no others, on a real API server, with real machines; and kills them.
//
// What Kubernetes and KubeVirt would do the test does: it binds the claim, and shows a QEMU of this machine as the VirtualMachineInstance that it
// would be.
package operator
