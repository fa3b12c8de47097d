// Package agent does, on one node, the checkpoints and restores that are bound to it.
//
// What goes in: VMCheckpoint and VMRestore objects whose status.nodeName is this node, as the API server tells of them. What comes out:
// their images on the claims' volumes, machines restored, and the account of it in the objects' status. There is no other channel to anybody.
//
// An object that is bound becomes a task. Tasks wait in one queue, oldest object first: there is one at a time for a machine, and a bounded
// number in all. The engine's work is done by worker processes (package jobs); a task only starts them, listens, and writes status.
//
// What must hold:
//   - Only what the API server itself confirms to be bound here is begun: the cache may be old. The machine has to be on this node, with the uid
//     that the object was bound for.
//   - The machine never waits for the API server. Progress is kept in memory and written beside the work, once a second at most; the end of a
//     task is written until the API server takes it.
//   - Whatever died before is gone on with: an image that a dead agent sealed is found by its name and attributes and taken as the result; what
//     was half written is swept; a restore that had begun to overwrite memory is done again, from the start.
//   - How a restore leaves a machine that it does not finish stands in notes on the node, whatever becomes of the object; the object's conditions
//     follow. A machine is never resumed by anybody but the worker that stopped it, or whoever saw that worker die.
//   - A repository that a checkpoint says is on a claim is never made anew there, and an image in one that is missing does not count as gone.
//   - An image belongs to the namespace of its machine.
//   - An agent that ends asks its captures to end in order, and brings a restore that has begun to overwrite memory to its end.
package agent
