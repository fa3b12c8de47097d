// Package carrier wraps a device state in the one form that a standing QEMU loads it from: a qcow2 image that holds nothing
// but an internal snapshot with the stream as its vmstate.
//
// In goes a loadable stream (package devstate); out comes the image, written front to back. The disk of the image is one
// cluster that was never written.
//
//	cluster 0   header                      4   snapshot table, one entry
//	        1   refcount table              5   L1 table of the snapshot
//	        2   refcount block              6   L2 table of the snapshot, mapping the vmstate
//	        3   L1 table of the disk        7…  the vmstate
//
// A qcow2 vmstate begins at the first guest offset that no L1 entry of the disk covers: with 64 KiB clusters 512 MiB, the
// second L1 entry. QEMU writes into the image when it goes to the snapshot; the disk's L1 table has room for that, so
// the image does not grow.
//
// What must hold: the same stream, tag and time give the same bytes, and `qemu-img check` finds nothing in them.
package carrier
