// Package machine starts real QEMU machines with test guests, for tests, benchmarks and the demo.
//
// In goes a description ([Options]): which QEMU, how it runs the guest, what memory and devices there are, and the guest:
// the bare-metal [Writer], up in a tenth of a second and at work under any accelerator, or [Linux], Debian's cloud kernel
// with an init of our own. Out comes a running [Machine]: its process, a monitor for the test and a second monitor socket
// for the product, the serial log as lines, a channel to talk on, and the guest's memory to look at.
//
// What must hold:
//   - A machine ends with its test, whatever the way: QEMU is killed by its process id, and by the kernel if the test
//     process dies. Nothing but the machine's own directory is written, and that is removed.
//   - The same Options give the same machine, but for the paths of its sockets: a copy started with Paused is what a
//     restore needs. [Machine.Twin] makes that copy's Options.
//   - What cannot run here is skipped, saying what is missing; see [Unavailable].
package machine
