package agent

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
)

// task is one object's work.
type task struct {
	key     taskKey
	created time.Time // the object's, which decides who comes first
	machine string    // namespace/name of the instance that the work is done on; empty where there is none
	run     func(context.Context)
	ended   chan<- event.GenericEvent // told when it has ended and is not in the queue any more
	object  client.Object             // what it is told

	cancel context.CancelCauseFunc // set when it runs
}

// taskKey names an object: its kind, and its uid beside its name, since a name can come again.
type taskKey struct {
	kind string
	name types.NamespacedName
	uid  types.UID
}

// queue runs tasks: one at a time for a machine, a bounded number in all, the oldest first.
type queue struct {
	slots int
	base  context.Context // of all tasks

	mu      sync.Mutex
	waiting []*task
	running map[taskKey]*task
	closed  bool
	closing chan struct{} // closed with it
	done    sync.WaitGroup
	changed func(waiting, running int) // for metrics; called with mu held
}

func newQueue(base context.Context, slots int, changed func(waiting, running int)) *queue {
	return &queue{slots: slots, base: base, running: map[taskKey]*task{}, closing: make(chan struct{}), changed: changed}
}

// add puts a task into the queue, unless it is there. It reports whether the task has to wait.
func (q *queue) add(t *task) (waits bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.running[t.key] != nil {
		return false
	}
	if !slices.ContainsFunc(q.waiting, func(w *task) bool { return w.key == t.key }) {
		at, _ := slices.BinarySearchFunc(q.waiting, t, func(a, b *task) int {
			if c := a.created.Compare(b.created); c != 0 {
				return c
			}
			return strings.Compare(a.key.name.String(), b.key.name.String())
		})
		q.waiting = slices.Insert(q.waiting, at, t)
	}
	q.start()
	return q.running[t.key] == nil
}

// has reports whether an object's task runs, or waits.
func (q *queue) has(key taskKey) (running, waiting bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.running[key] != nil, slices.ContainsFunc(q.waiting, func(w *task) bool { return w.key == key })
}

// cancel takes a task out of the queue, or asks it to end. It reports whether it still runs.
func (q *queue) cancel(key taskKey, cause error) (running bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = slices.DeleteFunc(q.waiting, func(w *task) bool { return w.key == key })
	q.changed(len(q.waiting), len(q.running))
	if t := q.running[key]; t != nil {
		t.cancel(cause)
		return true
	}
	return false
}

// close lets nothing more begin, asks all to end and waits for that.
func (q *queue) close(cause error) {
	q.mu.Lock()
	if !q.closed {
		close(q.closing)
	}
	q.closed, q.waiting = true, nil
	for _, t := range q.running {
		t.cancel(cause)
	}
	q.mu.Unlock()
	q.done.Wait()
}

// start starts what may run. mu is held.
func (q *queue) start() {
	defer func() { q.changed(len(q.waiting), len(q.running)) }()
	for i := 0; i < len(q.waiting) && len(q.running) < q.slots && !q.closed; {
		t := q.waiting[i]
		if q.atWork(t.machine) {
			i++
			continue
		}
		q.waiting = slices.Delete(q.waiting, i, i+1)
		ctx, cancel := context.WithCancelCause(q.base)
		t.cancel = cancel
		q.running[t.key] = t
		q.done.Go(func() {
			defer q.ended(t)
			defer cancel(nil)
			t.run(ctx)
		})
	}
}

func (q *queue) atWork(machine string) bool {
	if machine == "" {
		return false
	}
	for _, t := range q.running {
		if t.machine == machine {
			return true
		}
	}
	return false
}

func (q *queue) ended(t *task) {
	q.mu.Lock()
	delete(q.running, t.key)
	q.start()
	q.mu.Unlock()
	select {
	case t.ended <- event.GenericEvent{Object: t.object}:
	case <-q.closing: // nobody listens any more
	}
}
