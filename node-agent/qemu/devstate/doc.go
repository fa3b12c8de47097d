// Package devstate reads and edits the stream that QEMU's xen-save-devices-state writes: everything of a machine that is
// not RAM.
//
// In goes the stream as QEMU wrote it. Out come the list of its sections, to compare two saves of one machine, and the
// same stream in the form that QEMU loads.
//
//	QEVM, version 3                     8 bytes
//	[07, length, machine type]          the configuration: a loader wants it, the saver leaves it out
//	04, section id, name, instance, version; the device's state; 7e, section id
//	...
//	00                                  end
//	[06, length, JSON]                  a description of the fields, for people; a loader warns where it is missing
//
// All integers are big-endian (QEMU, migration/savevm.c). The device's state has no length and only QEMU can read it, so
// a section's end is where its footer stands and something sensible follows. What is sensible there can also occur inside
// a state by chance: a stream that can be read in two ways is refused.
//
// What must hold: the stream is hostile input, and reading it takes time and memory in proportion to its length.
package devstate
