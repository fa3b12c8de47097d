// Package linux builds the Linux test guest: an initramfs with an init of our own (command init beside this file) and the
// modules that it needs, for Debian's cloud kernel.
//
// In goes a directory with a kernel and its modules, as hack/setup unpacks it; out comes the initramfs's path. What must
// hold: the file's name changes with everything that is in it, so that it is built once and never stale.
package linux
