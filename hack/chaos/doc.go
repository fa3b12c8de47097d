// Command chaos tries faults of a capture at each of its steps, and reports how many were survived, by fault and step.
//
//	chaos [-repeat N] [-minutes M] [-run REGEXP]
//
// The faults are those of package test/faults: processes killed, stopped and hung, the volume broken, full, slow and hanging, migrations, devices,
// others at the monitor. Each is a test that asks afterwards whether the guest goes on, its memory is as it left it, the repository is whole
// and the next checkpoint is byte for byte the truth.
package main
