package capture

import (
	"sync"
	"time"

	"github.com/vmckpt/vmckpt/image"
)

// progressEvery is how often progress is told.
const progressEvery = 100 * time.Millisecond

// reporter tells progress in a goroutine of its own, so that no work waits for whoever listens.
type reporter struct {
	mu    sync.Mutex
	now   Progress
	image func() image.Progress // nil as long as there is no image

	quit chan struct{}
	done sync.WaitGroup
}

func newReporter(tell func(Progress)) *reporter {
	r := &reporter{quit: make(chan struct{})}
	if tell == nil {
		return r
	}
	r.done.Go(func() {
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
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
	if r.image != nil {
		r.now.Image = r.image()
	}
	return r.now
}

// phase begins a phase in which total pages are to be looked at.
func (r *reporter) phase(name string, total uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Phase, r.now.DonePages, r.now.TotalPages = name, 0, total
}

// add says that pages of the phase are done.
func (r *reporter) add(pages uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.DonePages += pages
}

// attach lets the reporter look at the image that is written.
func (r *reporter) attach(f func() image.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.image = f
}

func (r *reporter) stop() {
	close(r.quit)
	r.done.Wait()
}
