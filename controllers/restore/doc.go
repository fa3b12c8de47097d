// Package restore brings VMRestores to the nodes where their machines are.
//
// Like package checkpoint it has one concern: from the making of the object to its binding, and what becomes of it when its node is gone. It waits for the checkpoint that is to be restored, for
// the machine and for its state: one that stands paused, or any for a roll-back in place. Of several restores of a machine the oldest goes first.
package restore
