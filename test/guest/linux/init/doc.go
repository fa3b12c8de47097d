// Command init is the only process of the Linux test guest: it loads modules, sets its loads to work, and answers on a
// virtio-serial port. It is built static and goes into an initramfs as /init.
//
// In goes the kernel command line, which says what it does:
//
//	vmckpt.load=counter,dma,net,alloc,stress   which loads work (default: counter)
//	vmckpt.buffer=16    MiB of the counter's buffer
//	vmckpt.group=16     pages that each count rewrites
//	vmckpt.step=100     milliseconds from count to count
//	vmckpt.work=256     MiB of the area that "work N" writes
//	vmckpt.stress=25    percent of memory that stress writes to
//
// Out come lines on the serial console: "init: ready" once all loads are at work, then each load's account of itself as it gets on.
//
// What must hold: it never ends, since the kernel panics when it does. A load that finds memory or a disk sector to hold what it must
// not prints a line that begins with CORRUPT; one that cannot go on prints a line that begins with "init:", and the others go on.
package main
