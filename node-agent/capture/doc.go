// Package capture takes one checkpoint of a running machine.
//
// What goes in: a QEMU process with a monitor ([Target]), a repository and [Options]. What comes out: a sealed image that describes the machine
// as it was at one instant, and a [Result] that says how it was done and what it cost. The way through it:
//
//	prepare    refuse what cannot be captured truly; choose the parent; open the session (tracking) and the image
//	rounds     guest running: harvest what is dirty, a barrier, copy it; left out where little is dirty
//	instant    on the leash: harvest the rest, copy it, start tracking over, let go; tried again where it did not hold
//	seal       image first, session record after it
//
// What must hold:
//
//   - Whatever is harvested is copied after it was harvested, or is in the next instant's residue. A page counts as copied only until it
//     is harvested again.
//   - Between a live harvest and the copying of its pages the machine stands still once with its I/O drained (the barrier): a page pinned
//     for DMA before the harvest may be written after it without showing again.
//   - Nothing of an instant counts before the leash has proved that it held to the end and QEMU has been asked that nothing changed
//     beside it. Until then its pages stay pending.
//   - Nothing is written to a file while the machine is held, unless the residue is larger than the buffers.
//   - At each step a kill -9 leaves the machine running (or paused, if its owner paused it), no image under its name unless it is
//     whole, and a session record that is invalid unless it is true.
package capture
