// Package v1alpha1 has the types of the API group vmckpt.io: live checkpoints of KubeVirt's virtual machines, memory included, and
// restores of them.
//
// An object is a request and the account of what became of it. Controller and node agents meet nowhere else: the controller checks a request
// and binds it to a node (status.nodeName), the agent of that node does the work and reports. Specs cannot be changed once they are made.
//
// +kubebuilder:object:generate=true
// +groupName=vmckpt.io
package v1alpha1
