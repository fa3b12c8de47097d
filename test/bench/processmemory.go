package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// memoryWatch looks at how much memory a worker and its children have at the most.
type memoryWatch struct {
	quit chan struct{}
	done sync.WaitGroup

	worker int64 // bytes
	child  int64 // of the largest: they live one after the other
}

// watchEvery is how often: the kernel keeps each process's own peak, so only what grows in a process's last moments is missed.
const watchEvery = 20 * time.Millisecond

func watchMemory(pid int) *memoryWatch {
	w := &memoryWatch{quit: make(chan struct{})}
	w.done.Go(func() {
		for {
			w.look(pid)
			select {
			case <-time.After(watchEvery):
			case <-w.quit:
				return
			}
		}
	})
	return w
}

func (w *memoryWatch) look(worker int) {
	_, peak := statusOf(worker)
	w.worker = max(w.worker, peak)
	environment, err := environmentOf(worker)
	if err != nil {
		return
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, p := range processes {
		// A process younger than the worker has a higher number, but for the one time that numbers begin again.
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid < worker {
			continue
		}
		// Until it executes its own program a child is in the worker's memory, and has that one's environment too.
		if parent, _ := statusOf(pid); parent != worker {
			continue
		}
		if own, err := environmentOf(pid); err != nil || bytes.Equal(own, environment) {
			continue
		}
		_, peak := statusOf(pid)
		w.child = max(w.child, peak)
	}
}

func environmentOf(pid int) ([]byte, error) { return os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) }

// statusOf returns a process's parent and the most memory that it ever had, what it shares included; zeros when it has ended.
func statusOf(pid int) (parent int, peakBytes int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		number, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "PPid":
			parent = int(number)
		case "VmHWM":
			peakBytes = number << 10
		}
	}
	return parent, peakBytes
}

// end returns the peak of the worker and of the largest of its children, pages that they share counted for both.
func (w *memoryWatch) end() (worker, child int64) {
	close(w.quit)
	w.done.Wait()
	return w.worker, w.child
}
