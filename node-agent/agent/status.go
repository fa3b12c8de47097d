package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// errNotOurs says that an object is gone, is done, or is not bound to this node any more: nothing is to be written to it.
var errNotOurs = errors.New("the object is not this node's to work on")

func ignoreNotOurs(err error) error {
	if errors.Is(err, errNotOurs) {
		return nil
	}
	return err
}

// refusedError says that the API server does not take a status, and will not however often it is asked.
type refusedError struct{ err error }

func (e *refusedError) Error() string {
	return fmt.Sprintf("the API server refuses the status: %v", e.err)
}

func (e *refusedError) Unwrap() error { return e.err }

// refused tells such an answer from one that may be another the next moment.
func refused(err error) bool {
	var answer apierrors.APIStatus
	if !errors.As(err, &answer) {
		return false
	}
	switch code := answer.Status().Code; code {
	case http.StatusNotFound, http.StatusRequestTimeout, http.StatusConflict, http.StatusTooManyRequests:
		return false
	default:
		return code >= 400 && code < 500
	}
}

// writeEvery is how long one waits for the API server between two tries of a write that has to be made.
const writeEvery = 2 * time.Second

// change reads an object from the API server and writes its status as do has changed it. Whoever else changed it in between is taken into account
// by doing it again. do returns false where there is nothing to write. An API server that is away or busy is asked again until ctx ends; what
// it refuses is a [*refusedError].
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
		case refused(err):
			return fmt.Errorf("write the status of %v: %w", name, &refusedError{err})
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
	now  chan struct{} // something that is to be written at once
	quit chan struct{}
	done sync.WaitGroup
}

// reportEvery is how often progress is written at the most.
const reportEvery = time.Second

func report[P comparable](ctx context.Context, a *Agent, write func(context.Context, P) error) *reporter[P] {
	r := &reporter[P]{now: make(chan struct{}, 1), quit: make(chan struct{})}
	r.done.Go(func() {
		tick := a.o.Clock.NewTicker(reportEvery)
		defer tick.Stop()
		var written P
		for {
			select {
			case <-tick.C():
			case <-r.now:
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

// writeProgress writes progress into the object of that uid and no other. It writes nothing else, and does not mind who wrote in between.
func (a *Agent) writeProgress(ctx context.Context, o client.Object, p vmckptv1.Progress) error {
	p.Time = metav1.Time{Time: a.o.Clock.Now()}
	text, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": o.GetUID()}, "status": map[string]any{"progress": p}})
	if err != nil {
		return err
	}
	return a.client.Status().Patch(ctx, o, client.RawPatch(types.MergePatchType, text))
}

// tell takes the newest progress. It never waits.
func (r *reporter[P]) tell(p P) {
	r.mu.Lock()
	r.last = p
	r.mu.Unlock()
}

// hurry has what was told last written at once. It never waits.
func (r *reporter[P]) hurry() {
	select {
	case r.now <- struct{}{}:
	default: // about to be
	}
}

// stop returns when nothing is written any more.
func (r *reporter[P]) stop() {
	close(r.quit)
	r.done.Wait()
}
