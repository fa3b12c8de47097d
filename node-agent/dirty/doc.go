// Package dirty knows which pages of a running QEMU may differ from its last image.
//
// In goes a process, its RAM blocks and a directory for the session record. Out come page sets: what has to be looked at
// again ([Instant.Pages]), and what is unpopulated ([Instant.Holes]). The way through it:
//
//	Open            the session of one QEMU process, alone on it by a lock; reads the record, checks it against the process
//	HarvestLive     guest running: what was written since; re-armed and reported in one system call
//	HarvestStanding guest standing: the truth of that instant, nothing changed yet
//	Instant.Rearm   still standing: tracking starts over from the instant
//	Sealed          the image that holds the instant is sealed: the record is valid again, naming it
//
// What must hold:
//
//   - The pages reported are a superset of those that changed. Whatever is unsure is dirty: a source that fails, a block
//     that no source sees completely, a record that does not fit.
//   - A page is never protected without being reported by the same system call, and what was reported stays pending until
//     an image that holds it is sealed. A scan that protects destroys what it read, so a page dropped between the scan
//     and the sealed image would be missing from every later increment.
//   - The record on the node is invalid, and synced so, before the first protecting scan of a capture. Pending pages live in
//     the worker's memory alone: when the worker is lost, the invalid record says that they are.
//   - What is tracked is read from the process (its mappings, its file descriptors, the kernel's answer to every scan), never
//     remembered.
//   - Pages pinned for DMA before a live harvest and written after it do not show again. Between a live harvest and the copying of
//     its pages there has to be a standstill with drained I/O; this package cannot see whether there was one.
//
// Sources are combined by [Union]. The page tables ([PageTables]) and the content hash ([ContentHash]) are here; KVM's
// dirty log ([KVMLog]) is a witness beside them: see [Comparison]. Soft-dirty would be another source.
package dirty
