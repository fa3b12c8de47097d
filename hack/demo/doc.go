// Demo shows what VMckpt does, on a real guest: Debian's cloud kernel, run by libvirt as KubeVirt's virt-launcher runs it, is
// captured while it works, killed, restored from two of its images, and rolled back in place. It runs the same commands that a user would.
//
// In goes what hack/setup demo and go build have left: QEMU, libvirt, a kernel, bin/vmckpt. Out come the commands as they are run, what they
// print, and what the guest says.
//
// Whether the guest is where it was, the guest itself says: it counts, each count rewrites a part of a buffer whose hash follows from the
// count, and it prints both. What it prints first after a restore has to be what comes next after the image's instant, and the lines after
// that have to go on by one, each with the hash that its count must have. No two images were taken at the same counts, and the guest is far
// from the image when it is rolled back: so another image, or none, would show.
//
// What must hold: it ends with 0 only if all that was shown held, and leaves neither processes nor files behind.
package main
