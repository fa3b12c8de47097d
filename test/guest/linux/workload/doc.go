// Package workload holds what the Linux test guest and the host must agree on: what the guest's memory and disk contain,
// as functions of a count or a sector number alone.
//
// In goes a number, out come bytes or their hash. What must hold: both sides are built from this package, so a guest that
// goes on from the wrong memory cannot agree with the host about its hash.
package workload
