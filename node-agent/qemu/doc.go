// Package qemu speaks with a running QEMU and says what it is.
//
// In go a process (by guest name, UUID or pid) and a way to its monitor: a plain QMP socket or libvirt's RPC. Out come
// plain values: where each RAM block lies in the process ([ReadLayout]), what the machine is made of ([Describe],
// [Compare]), whether it can be captured truly ([Capturable]), in which state it is ([Status], [Migration]), and its
// device state as a stream of bytes ([SaveDeviceState], [LoadDeviceState]).
//
// What must hold:
//
//   - What QEMU and libvirt answer is hostile input: a guest that broke out of its VM speaks through them. Every message
//     is bounded, every address they name is checked against the kernel's own view of the process, and nothing they
//     say is used as a path on this machine.
//   - A path inside a pod is opened beneath that process's root and never by its name on the node.
//   - A process is its pid and its start time together.
//   - Only [MayContinue] decides whether a VM that stands still is woken, unless its owner says so.
//   - xen-load-devices-state is never sent: it ends in an assertion in QEMU, whether the load was good or not.
package qemu
