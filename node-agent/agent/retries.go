package agent

import (
	"fmt"
	"sync"
	"time"
)

// retries remembers when objects are tried again. An agent that starts anew tries at once.
type retries struct {
	mu sync.Mutex
	at map[taskKey]retryState
}

type retryState struct {
	failures  int
	next      time.Time
	last      string // what the last failure was
	unwritten bool   // of the last failure: that only the writing of the status failed
}

// after notes a failure and returns how long is waited.
func (r *retries) after(key taskKey, failure error, now time.Time, wait func(int) time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.at[key]
	s.last = failure.Error()
	s.unwritten = false
	s.failures++
	d := wait(s.failures)
	s.next = now.Add(d)
	if r.at == nil {
		r.at = map[taskKey]retryState{}
	}
	r.at[key] = s
	return d
}

// unwritten notes of the last failure that the work itself had come to its end: what is left takes no time of the object's.
func (r *retries) unwritten(key taskKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s, ok := r.at[key]; ok {
		s.unwritten = true
		r.at[key] = s
	}
}

// onlyUnwritten tells whether all that is left is to write a status.
func (r *retries) onlyUnwritten(key taskKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at[key].unwritten
}

// left is how long an object still waits.
func (r *retries) left(key taskKey, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at[key].next.Sub(now)
}

// timedOut says of an object whose time is over what was in the way, rather than what was interrupted.
func (r *retries) timedOut(key taskKey, timeout time.Duration, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last := r.at[key].last; last != "" {
		return fmt.Errorf("not done in %v; the attempt before failed: %s", timeout, last)
	}
	return fmt.Errorf("not done in %v: %w", timeout, err)
}

func (r *retries) forget(key taskKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.at, key)
}
