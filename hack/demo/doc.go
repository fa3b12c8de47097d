// Demo shows what VMckpt does, on a real guest: Debian's cloud kernel, run by libvirt as KubeVirt's virt-launcher runs it, is
// captured while it works, killed, restored from two of its images, and rolled back in place. It runs the same commands that a user would,
// and asks the guest each time whether it is where it was: the guest counts, and each count rewrites a part of a buffer whose hash
// follows from the count.
//
// In goes what hack/setup demo and go build have left: QEMU, libvirt, a kernel, bin/vmckpt. Out come the commands as they are run, what they
// print, and what the guest says.
//
// What must hold: it ends with 0 only if all that was shown held, and leaves neither processes nor files behind.
package main
