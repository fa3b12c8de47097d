package agent_test

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// crowd is an engine that does nothing, for a short while: what is tested is the queue, and what the API server has to bear. It sees that no
// machine is captured twice at once, and how many are.
type crowd struct {
	agent.Workers
	mu      sync.Mutex
	busy    map[string]bool
	most    int
	twice   bool
	sealed  map[string]*jobs.ImageResult
	ordered []string
}

func (c *crowd) Image(_ context.Context, r jobs.ImageRequest, _ func(jobs.VerifyProgress)) (*jobs.ImageResult, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if found := c.sealed[r.Image]; found != nil {
		return found, nil
	}
	return nil, fmt.Errorf("open image: %w", image.ErrNotFound)
}

func (c *crowd) Capture(_ context.Context, r jobs.CaptureRequest, progress func(capture.Progress)) (*capture.Result, error) {
	c.mu.Lock()
	c.twice = c.twice || c.busy[r.VM.Guest]
	c.busy[r.VM.Guest] = true
	c.most = max(c.most, len(c.busy))
	c.ordered = append(c.ordered, r.Name)
	c.mu.Unlock()
	for i := range 10 {
		progress(capture.Progress{Phase: "copying", DonePages: uint64(i), TotalPages: 10})
		time.Sleep(time.Millisecond)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.busy, r.VM.Guest)
	c.sealed[r.Name] = &jobs.ImageResult{Name: r.Name, Attributes: r.Attributes}
	return &capture.Result{Image: r.Name, Duration: 10 * time.Millisecond}, nil
}

// counter counts calls to the API server by their verb.
type counter struct{ reads, writes, watches atomic.Int64 }

func (c *counter) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTrip(func(r *http.Request) (*http.Response, error) {
		switch {
		case strings.Contains(r.URL.RawQuery, "watch=true"):
			c.watches.Add(1)
		case r.Method == http.MethodGet:
			c.reads.Add(1)
		case strings.Contains(r.URL.Path, "/vmckpt.io/"):
			c.writes.Add(1)
		}
		return next.RoundTrip(r)
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// allReady waits until so many checkpoints are ready, and all that there are.
func (r *rig) allReady(many int, within time.Duration) []vmckptv1.VMCheckpoint {
	r.Helper()
	for until := time.Now().Add(within); ; time.Sleep(200 * time.Millisecond) {
		var list vmckptv1.VMCheckpointList
		r.must(r.List(r.Context(), &list, client.InNamespace(r.namespace)))
		ready := 0
		for i := range list.Items {
			if o := &list.Items[i]; o.Ready() {
				ready++
			} else if o.Done() {
				r.Fatalf("%s: %s", o.Name, message(o.Status.Conditions))
			}
		}
		if ready == many {
			return list.Items
		}
		if time.Now().After(until) {
			r.Fatalf("%d of %d are ready", ready, many)
		}
	}
}

// atOnce makes so many checkpoints, of one machine after the other.
func (r *rig) atOnce(many int, vmis []*kubevirtv1.VirtualMachineInstance) {
	r.Helper()
	var makers sync.WaitGroup
	for part := range 8 {
		makers.Go(func() {
			for i := part; i < many; i += 8 {
				r.checkpoint(fmt.Sprintf("c-%04d", i), vmis[i%len(vmis)], nil)
			}
		})
	}
	makers.Wait()
}

// TestThousand checkpoints at once, of a hundred machines: a bounded number is worked on, one a machine, the oldest first; each costs the API
// server a few calls, and the agent little memory.
func TestThousand(t *testing.T) {
	const many, machines, slots = 1000, 100, 4
	r := newRig(t)
	r.claim("claim")
	var vmis []*kubevirtv1.VirtualMachineInstance
	for i := range machines {
		vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: fmt.Sprintf("vm-%d", i)}}
		vmi.Status.NodeName, vmi.Status.Phase = node, kubevirtv1.Running
		r.must(r.Create(t.Context(), vmi))
		vmis = append(vmis, vmi)
	}
	r.atOnce(many, vmis)
	engine := &crowd{busy: map[string]bool{}, sealed: map[string]*jobs.ImageResult{}}
	calls := &counter{}
	begin := time.Now()
	stop := r.agentCounted(node, calls, func(o *agent.Options) { o.Engine, o.Slots = engine, slots })
	r.allReady(many, 3*bound)
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	reads, writes := calls.reads.Load(), calls.writes.Load()
	t.Logf("%v; %d reads, %d writes, %d watches; heap %d MiB; %d at once", time.Since(begin), reads, writes, calls.watches.Load(), memory.HeapInuse>>20, engine.most)
	if engine.twice || engine.most != slots {
		t.Errorf("one machine twice at once: %v; at most %d at once, of %d", engine.twice, engine.most, slots)
	}
	// For each: queued, running, ready.
	if writes > 4*many {
		t.Errorf("%d writes for %d checkpoints", writes, many)
	}
	if reads > 10*many {
		t.Errorf("%d reads for %d checkpoints", reads, many)
	}

	// What is done is not looked at again.
	for quiet := time.Now(); ; {
		rest := calls.reads.Load() + calls.writes.Load()
		time.Sleep(2 * time.Second)
		if calls.reads.Load()+calls.writes.Load() == rest {
			break
		}
		if time.Since(quiet) > bound {
			t.Fatal("the agent goes on calling with nothing to do")
		}
	}
	stop()
}
