// Package image holds the image format and the repository: where a virtual machine's memory and device state lie between
// a checkpoint and a restore. docs/image-format.md describes every byte.
//
// What goes in: pages of 4096 bytes, block by block, in batches and in any order, with word of those that need no saving
// ([Writer]); a device state and a description of the machine at the end. What comes out: an [Image], complete and
// synced, that gives every page of every block exactly once ([Image.Load]), whatever chain of parents it was made on.
//
// What must hold:
//
//   - An image is seen under its name only when it is whole: it is written beneath tmp/ and appears by one rename, after
//     everything in it was synced.
//   - Whoever owns the volume may change any byte at any time. Nothing read from a repository is believed before a tag or
//     MAC under the repository's keys has been checked, sizes are bounded before memory is taken for them, and files are
//     opened beneath an [os.Root], regular ones only.
//   - A frame of pages is bound to its file and its place in it, an index to its image, a manifest to its name and
//     repository: nothing that was authentic somewhere is authentic anywhere else.
//   - An image refers to nothing outside its own directory. The data files of its ancestors that it needs are hard links
//     (copies, where the file system has no links), so deleting an image never breaks another.
//   - For a page submitted or marked more than once, the last call wins, however the work behind the calls overlapped.
//   - Memory is bounded whatever the size of the machine: [Spec].BufferBytes for pages, a fixed sum for the index.
//
// The package knows pages and bytes. It knows nothing of virtual machines, hypervisors or clusters.
package image
