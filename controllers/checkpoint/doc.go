// Package checkpoint brings VMCheckpoints to the nodes where their machines are.
//
// It has one concern: from the moment that a checkpoint is made until it is bound (status.nodeName), or refused. What it waits for it says in
// the conditions, and it is woken when that changes: it watches what it looks at. From the binding on the object is the node agent's, until the
// agent gives it back or it is deleted; or until the node is gone, and its agent with it, which only this controller can say.
//
// A checkpoint is taken of a machine that runs. One whose machine is not there waits, however long: a repository of manifests that is applied to
// an empty cluster captures nothing; what was captured is restored from its claim. For the same reason a machine with a restore ahead of it is
// not captured before that is done.
//
// The finalizer is put on just before the binding, so that there is no image without an object that answers for it, and nothing that only waits
// outlives the operator. Who takes it off: the agent once it has removed the image; this controller where there is none, where it is to be kept, and
// where the node is gone and no other reaches the volume.
package checkpoint
