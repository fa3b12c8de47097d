// Package apiserver runs a real kube-apiserver on a real etcd, for tests of what VMckpt says to Kubernetes.
//
// In goes nothing but the programs, which hack/setup puts in the cache directory (or KUBEBUILDER_ASSETS names). Out comes
// a running [Server]: clients of it as its administrator, as users and as service accounts, with RBAC deciding what they
// may; CustomResourceDefinitions, KubeVirt's among them; and the faults that a controller has to live with: an API
// server that is gone for a while, and an etcd that lost everything.
//
// Starting takes seconds, so the tests of a package share one Server ([Shared]), each in a namespace of its own. A test
// that stops or wipes the server does not run in parallel with others that use it.
//
// There are no controllers, no scheduler and no kubelet: a namespace that is deleted stays in Terminating, nothing is
// garbage collected by its owner, pods stay Pending, and no service account is made for a namespace.
//
// What must hold:
//   - The programs end with the test process, whatever the way: they are killed by their process ids, and by the kernel
//     if the test process dies. Nothing but the server's own directory is written, and that is removed; envtest remembers
//     the ports it gave away in the user's cache directory.
//   - They listen on the loopback address alone. The ports that clients know are none that outgoing connections take, so
//     that a server that was stopped gets its port back.
//   - What cannot run here is skipped, saying what is missing; see [machine.Unavailable].
package apiserver
