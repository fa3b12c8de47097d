// Package durable writes the small files in which the node remembers things.
//
// In goes a directory, a name in it and a value that JSON can carry; out comes the file. Reading it is its owner's own matter.
//
// What must hold: a file is in place whole or not at all, and when a call returns, what it did is on the disk and survives a crash of
// the machine. Whoever writes a name has it to himself, by a lock of his own.
package durable
