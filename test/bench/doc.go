// Command bench measures what checkpoints cost on real machines, and sets it beside the project's goals, the volume's own speed, and
// QEMU's own ways of saving a machine.
//
//	go run ./test/bench [-runs N] [-dir DIRECTORY] [-json FILE] [-only WORDS]
//
// Out come Markdown tables, medians with the least and the most of all runs; with -json the same figures, every run of them. What must
// hold: everything that is compared was measured in one run, on one volume; a checkpoint is taken by a worker process, as the command
// line takes it; and what fills the guests is said with the figures.
package main
