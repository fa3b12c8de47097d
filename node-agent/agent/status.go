package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// object is a VMCheckpoint or a VMRestore.
type object interface {
	client.Object
	Done() bool
	Waiting(reason, message string, now time.Time)
	Failed(reason, message string, now time.Time)
}

// errNotOurs says that an object is gone, is done, or is not bound to this node any more: nothing is to be written to it.
var errNotOurs = errors.New("the object is not this node's to work on")

// writeEvery is how long one waits for the API server between two tries of a write that has to be made.
const writeEvery = 2 * time.Second

// change reads an object from the API server and writes its status as do has changed it. Whoever else changed it in between is taken into account
// by doing it again. do returns false where there is nothing to write. Errors of the API server are tried again until ctx ends.
func change[T object](ctx context.Context, a *Agent, o T, ours func(T) bool, do func(T) bool) error {
	uid, name := o.GetUID(), client.ObjectKeyFromObject(o)
	for {
		err := a.live.Get(ctx, name, o)
		switch {
		case apierrors.IsNotFound(err), err == nil && (o.GetUID() != uid || !ours(o)):
			return errNotOurs
		case err == nil && !do(o):
			return nil
		case err == nil:
			err = a.client.Status().Update(ctx, o)
		}
		switch {
		case err == nil:
			return nil
		case apierrors.IsNotFound(err):
			return errNotOurs
		case apierrors.IsConflict(err):
			continue
		case apierrors.IsInvalid(err), apierrors.IsForbidden(err):
			return fmt.Errorf("write the status of %v: %w", name, err)
		}
		log.FromContext(ctx).Info("the API server does not take a status; trying again", "object", name, "error", err.Error())
		select {
		case <-a.o.Clock.After(writeEvery):
		case <-ctx.Done():
			return fmt.Errorf("write the status of %v: %w (last: %w)", name, context.Cause(ctx), err)
		}
	}
}

// reporter writes progress beside the work, once a second at most, and never twice the same. What cannot be written is left out.
type reporter[P comparable] struct {
	mu   sync.Mutex
	last P
	quit chan struct{}
	done sync.WaitGroup
}

// reportEvery is how often progress is written at the most.
const reportEvery = time.Second

func report[P comparable](ctx context.Context, a *Agent, write func(context.Context, P) error) *reporter[P] {
	r := &reporter[P]{quit: make(chan struct{})}
	r.done.Go(func() {
		tick := a.o.Clock.NewTicker(reportEvery)
		defer tick.Stop()
		var written P
		for {
			select {
			case <-tick.C():
			case <-r.quit:
				return
			}
			r.mu.Lock()
			now := r.last
			r.mu.Unlock()
			if now == written {
				continue
			}
			once, cancel := context.WithTimeout(ctx, reportEvery)
			if err := write(once, now); err != nil {
				log.FromContext(ctx).V(1).Info("progress could not be written", "error", err.Error())
			} else {
				written = now
			}
			cancel()
		}
	})
	return r
}

// progressPatch writes progress into the object of that uid and no other.
func progressPatch(uid types.UID, p vmckptv1.Progress) (client.Patch, error) {
	text, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": uid}, "status": map[string]any{"progress": p}})
	if err != nil {
		return nil, err
	}
	return client.RawPatch(types.MergePatchType, text), nil
}

// tell takes the newest progress. It never waits.
func (r *reporter[P]) tell(p P) {
	r.mu.Lock()
	r.last = p
	r.mu.Unlock()
}

// stop returns when nothing is written any more.
func (r *reporter[P]) stop() {
	close(r.quit)
	r.done.Wait()
}
