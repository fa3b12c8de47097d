// Package guard holds what may keep a guest waiting: the leash, on which a virtual machine stands still for the instant of a
// checkpoint, and the guard, by which a write of the guest's waits until its page is copied (copy-on-write).
//
// # The leash
//
// QEMU's xen-save-devices-state stops the machine, writes the device state into a pipe and starts the machine again. Whoever
// reads that pipe decides how long the machine stands: QEMU's main thread waits in write(2), the big lock held, and nothing
// can resume the machine, write its memory or switch a migration over meanwhile. The read end is the leash.
//
// What goes in: the read end of a pipe whose write end is inside QEMU, and the length that the stream is known to have. What
// comes out: the moment at which the machine is held, and, once let go, the stream.
//
// What must hold:
//
//   - The read end is open in one process only, the holder: when that dies QEMU gets EPIPE, fails its command and starts the
//     machine again by itself. Nothing else is needed to bring the machine back.
//   - The holder can always be killed: it does no file I/O, its memory is locked, and it takes no lock that others hold.
//   - The holder never holds for longer than its bound, whatever happens to it: a timer of the kernel's kills it, which
//     works on a process that is stopped or hangs as well. The worker watches it from outside too.
//   - When the worker dies the holder sees its control socket closed, and ends.
//
// # The guard
//
// Memory is registered with a synchronous userfaultfd and protected beforehand, the guest running. Until the instant every page is let go as soon
// as it is written to; from then on it is copied into a ring that the worker reads, and let go after that. The worker copies all other pages
// itself, and says so.
//
// What goes in: a userfaultfd made inside QEMU, and areas of its memory. What comes out: pages as they were at the instant.
//
// What must hold:
//
//   - The userfaultfd is open in one process only, the keeper: when that dies the kernel lifts the guard, and the guest goes on.
//   - The keeper can always be killed: it does no file I/O, its memory is locked, it waits for nobody but for room in the ring.
//   - No write waits for longer than its bound: the keeper gives the guard up then, and where the keeper itself does not come round, a timer of
//     the kernel's kills it.
//   - A page is in the ring before it is let go, and once. A page that the worker read counts only if it still was protected afterwards.
//   - When the worker dies the keeper sees its control socket closed, lifts the guard in steps, and ends.
package guard
