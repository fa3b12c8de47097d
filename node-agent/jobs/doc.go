// Package jobs holds what is done in worker processes: a capture, a restore, the release of tracking; and what
// is left to do for a machine whose worker died. Whoever wants one done, be
// it the command line or the agent, gives its request to [supervise.Run] under the job's name, and both tell errors apart by
// the same codes.
//
// What goes in: requests, plain values that JSON can carry, with paths and process ids for everything that a worker has to open
// by itself. What comes out: progress and results of packages capture and restore as they are, and errors with a [Code].
//
// What must hold: a job that is asked to end returns only when the machine runs by itself again and its temporary files are
// gone; nothing here decides what the packages below decide.
package jobs
