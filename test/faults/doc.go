// Package faults does to a checkpoint what a production machine does: workers and holders are killed, stopped and hung at every step,
// volumes run full, QEMU dies, migrations begin and end, others resume and pause the machine, images are damaged.
//
// After every single fault the same is asked: the guest runs, or stands as its owner left it, and has noticed nothing itself; the
// repository holds nothing half-made; and the next checkpoint is byte-exact against the truth (package truth).
package faults
