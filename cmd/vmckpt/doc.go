// Command vmckpt takes checkpoints of QEMU machines that run on this host and restores them, and looks after the repository
// that their images are in. docs/cli.md describes it to its users.
//
// What goes in: arguments, two environment variables, signals. What comes out: on standard output the answer, for people or as
// exactly one JSON value; on standard error progress, what went wrong and what to do about it; an exit code that tells the
// kinds of failure apart.
//
// What must hold:
//
//   - Nothing here touches a machine. That is done in worker processes (packages jobs and supervise), which this process can
//     ask to end and can lose without harm.
//   - No switch takes a safety away that the packages beneath have: what they refuse stays refused.
//   - Keys are named by file, never given as arguments, which every process of the host can read.
package main
