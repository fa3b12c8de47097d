// Package pageset holds sets of pages: one bit a page, walked in runs.
//
// In go runs of page numbers of one memory block; out come the runs of a set, ascending and merged, and how many pages it has. A [Set] is
// what the stages of a capture pass to one another: the dirty set, the pending set, the holes. It is dense, since a dirty set is dense
// where it matters: 32 KiB for each GiB of guest memory, whatever it holds.
//
// What must hold: a set has pages of its own block alone, those from 0 up to its length. To add what lies beyond, or to combine sets of different
// lengths, is a mistake of the caller's and panics: a page lost without a word would be missing from an image.
package pageset
