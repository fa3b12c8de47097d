// Package restore puts a machine back to the instant of an image: eagerly, all memory before the guest runs.
//
// What goes in: an image, opened; a QEMU process with a monitor ([Target]), that stands still or may be stopped ([Options].InPlace), made
// of the same devices and memory as the machine that the image is of. What comes out: that machine, standing still (or running,
// if asked), with the memory and device state of the instant, and a [Result] that says how it went. The way through it:
//
//	read       verify every byte of the image, parse the device state
//	examine    run state, migration, machine, RAM blocks: everything that could refuse the restore, nothing changed
//	lock       one piece of work a machine at a time; begins tracking
//	stop       in place only; then wait whether somebody resumes it
//	mark       the memory is invalid, noted and synced on the node
//	reset      load a device state without devices: whatever the guest told them to write, and where, is forgotten
//	memory     all of it in; zeros not where there is a hole
//	arm        from here on each write to memory shows
//	load       the device state. QEMU resets the machine once more, and rewrites its ROMs and tables
//	settle     what was written since is compared with the image and put in again, until it stays
//	unmark     tracking now counts from the image
//	run        if asked
//
// What must hold:
//
//   - A restore that is refused has not touched the machine; one that was stopped for it runs again. Before it is stopped a note says so
//     ([Stop]), by which whoever sees the restore being killed lets the machine go on ([Continue]).
//   - Before the first byte of memory is written the marker says so, and it is gone only when all memory was seen to be right. However
//     a restore ends before that, killed included, the machine stands still and is marked ([Invalid]): nothing here
//     continues it, the next restore finishes it, and whoever else works on machines asks first.
//   - A caller who wants the restore no more ends it before the mark. After it the restore is brought to its end, a second or so: the
//     machine could not be used otherwise.
//   - Only a standing machine is written to. Somebody who resumes it in the middle ends the restore, and the machine is stopped again. Nor
//     does it go elsewhere: a migration ends the restore, and is cancelled.
//   - No device may write memory while it is put in: the image's device state, and not the one that is about to vanish, goes with
//     that memory. Hence the reset before, which needs no system_reset (a machine that is told to end with a reboot would end).
//   - What the image says is right for every block of RAM, read-only ones too. A page that differs in the end, for whatever reason,
//     fails the restore.
//
// What a device does between the load and the settling by the hand of QEMU's main loop (input that arrives on a virtio-serial
// channel, say) belongs after the instant, and cannot be told from what the load itself wrote: it is taken back in memory and
// not in the device. These are a few milliseconds. Whoever writes to a machine's channels should wait until it runs.
//
// Disks are not this package's: they have to be as the image's instant knew them before it runs.
package restore
