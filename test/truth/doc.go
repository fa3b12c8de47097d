// Package truth knows what a checkpoint must hold, byte for byte, and judges the capture by it.
//
// Guests write their memory as fast as they can, by vCPU and by device DMA, while checkpoints are taken of them at random moments. In
// each pause a hook reads all of the machine's memory, whole and by itself; afterwards the image is restored to bytes and compared with
// that. Nothing that the capture knows or remembers is used here: neither dirty sets nor hashes, and the memory is read
// through /proc/PID/mem, which the capture does not read by.
//
// What must hold beside: each image is made on the parent and by the dirty source that the plan says, so that comparing everything does not
// pass for tracking; the guest writes from instant to instant, gives memory back where it can, and goes on afterwards without having found
// anything wrong; and at least two hundred random instants are judged, whatever machines can be had.
//
// The judge is judged too: a page left out of an image on purpose has to be found, that page and no other.
package truth
