// Package writer is the bare-metal test guest: a 64 KiB ROM without an operating system, that writes memory by vCPU and
// by device DMA as fast as the machine runs it, from some 60 ms after QEMU's start.
//
// In goes what it is to write ([Parameters]), out comes the ROM for QEMU's -bios. The guest keeps account at a known
// place in its memory ([StatusGPA]); the parameters lie in memory too ([ParametersGPA]) and are read again in every pass,
// so that a host may change them while it runs.
//
// What must hold: every page that the vCPU writes begins with a word and its seal, which depends on the page's address.
// The guest checks them before it writes the page again: [Status.Errors] grows if it ever finds a page that holds what it
// did not write there, or not all of it, as after a restore from an image torn within itself.
package writer
