package restore

import (
	"sync"
	"sync/atomic"
	"time"
)

// progressEvery is how often progress is told.
const progressEvery = 100 * time.Millisecond

// reporter tells progress in a goroutine of its own, so that no work waits for whoever listens.
type reporter struct {
	mu      sync.Mutex
	name    string
	total   int64
	invalid bool
	done    atomic.Int64

	now   chan struct{} // something that is to be told at once
	quit  chan struct{}
	ended sync.WaitGroup
}

func newReporter(tell func(Progress)) *reporter {
	r := &reporter{now: make(chan struct{}, 1), quit: make(chan struct{})}
	if tell == nil {
		return r
	}
	r.ended.Go(func() {
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				tell(r.state())
			case <-r.now:
				tell(r.state())
			case <-r.quit:
				tell(r.state())
				return
			}
		}
	})
	return r
}

func (r *reporter) state() Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Progress{Phase: r.name, DoneBytes: r.done.Load(), TotalBytes: r.total, MemoryInvalid: r.invalid}
}

// phase begins a phase of total bytes; 0 where that is not known.
func (r *reporter) phase(name string, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.name, r.total = name, total
	r.done.Store(0)
}

// marked says whether the machine's memory is marked invalid.
func (r *reporter) marked(invalid bool) {
	r.mu.Lock()
	r.invalid = invalid
	r.mu.Unlock()
	select {
	case r.now <- struct{}{}:
	default: // about to be told
	}
}

// reach says how far the phase is.
func (r *reporter) reach(done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total = total
	r.done.Store(done)
}

// stop ends the telling, with a last word.
func (r *reporter) stop() {
	close(r.quit)
	r.ended.Wait()
}
