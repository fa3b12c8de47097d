// Package faultyfs is a file system that fails on demand: a directory, seen through FUSE, whose volume is full, read-only, broken, slow or hangs as
// a test wants it.
package faultyfs
