// Package evict finds populated and unpopulated guest memory, so that an image leaves out what need not be saved.
//
// In goes a range of a process's addresses ([Resolve] learns what backs it); out comes the set of its pages that hold
// nothing: they were never written, or were given back, and read as zeros ([Memory.Unpopulated]).
//
// What must hold: a page is called unpopulated only if it reads as zeros in the process at the time of the call. An
// unsure answer means that the page is populated. The answer is the truth of an instant only when the VM stands still
// for the whole call; from a running guest it is a hint.
//
// Pages of one repeated word are found by the image's writer, which reads every page anyway.
package evict
