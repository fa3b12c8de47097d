package agent_test

import (
	"flag"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	kubevirtv1 "kubevirt.io/api/core/v1"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

var realLoad = flag.Int("real-load", 40, "how many checkpoints of real machines are asked for at once")

// heap watches the most that this process has in its heap.
type heap struct {
	most atomic.Uint64
	quit chan struct{}
}

func watchHeap() *heap {
	h := &heap{quit: make(chan struct{})}
	go func() {
		for {
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			h.most.Store(max(h.most.Load(), now.HeapInuse))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-h.quit:
				return
			}
		}
	}()
	return h
}

// TestRealLoad is TestThousand with real machines and the real engine: eight small ones, two of which write, and all checkpoints asked for at once.
// Each becomes an image that is whole, the machines go on, and neither the API server nor the agent's memory has to bear more for it.
func TestRealLoad(t *testing.T) {
	many, slots := *realLoad, 2
	r := newRig(t)
	volume := r.claim("claim")
	var vmis []*kubevirtv1.VirtualMachineInstance
	var writers []*machine.Machine
	for i := range 8 {
		name := fmt.Sprintf("vm-%d", i)
		o := machine.Options{Name: r.namespace + "_" + name, MemoryBytes: uint64(16+i/2*16) * machine.MiB, Guest: machine.Idle{}}
		if i >= 6 {
			o.Guest = machine.Writer{Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 20, Spin: 1_000_000}}
		}
		m := machine.Start(t, o)
		if i >= 6 {
			writers = append(writers, m)
		}
		vmis = append(vmis, r.instance(name, m))
	}
	r.atOnce(many, vmis)
	calls, begin, memory := &counter{}, time.Now(), watchHeap()
	r.agentCounted(node, calls, func(o *agent.Options) { o.Slots = slots })
	list := r.allReady(many, time.Minute+time.Duration(many)*2*time.Second)
	took := time.Since(begin)
	close(memory.quit)

	keys, err := image.ParseKeys([]byte(keyText(1)))
	r.must(err)
	repository, err := image.OpenRepositoryOn(volume, "vmckpt", keys)
	r.must(err)
	defer repository.Close()
	begin = time.Now()
	captures := 0
	for i := range list {
		o := &list[i]
		captures += int(o.Status.Attempts)
		img, err := repository.Open(t.Context(), o.Status.Image.Name)
		r.must(err)
		if err := img.Verify(t.Context(), nil); err != nil || img.Digest().String() != o.Status.Image.Digest {
			t.Errorf("%s: %v; %+v", o.Name, err, o.Status.Image)
		}
		r.must(img.Close())
	}
	t.Logf("%d checkpoints in %v, %d attempts, all verified in %v; %d reads, %d writes, %d watches; heap %d MiB at the most, this test's own included",
		many, took.Round(time.Second), captures, time.Since(begin).Round(time.Second), calls.reads.Load(), calls.writes.Load(), calls.watches.Load(), memory.most.Load()>>20)
	if got := images(t, volume); len(got) != many {
		t.Errorf("%d images of %d checkpoints", len(got), many)
	}
	// A capture tells how far it is once a second.
	if writes, most := calls.writes.Load(), int64(4*captures)+int64(took/time.Second)*int64(slots); writes > most {
		t.Errorf("%d writes for %d checkpoints, want %d at the most", writes, many, most)
	}
	for _, m := range writers {
		goesOn(t, m)
	}
}
