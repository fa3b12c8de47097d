// Package supervise runs each piece of work on a machine in a process of its own, the worker, and tells how it ended.
//
// What goes in: a job's name and a request, plain values that JSON can carry. What comes out: progress while it runs, and in the end
// a result, an error with its code, or [DiedError] where the worker is gone without a word.
//
// A worker may crash, hang in a volume that does not answer, be killed with its memory limit or with -9: none of that may take the
// agent with it, nor another machine's capture. A supervisor that dies ends its workers in order: each sees the end of its
// standard input, lets its machine go and removes what it began to write.
//
// Nothing has to be done here to bring a machine back that a dead worker was holding: the leash does that by itself (package
// guard). One that a restore had stopped is let go on by whoever asked for that (package jobs). What a dead worker leaves in a repository is swept later, by those who use the repository.
package supervise
