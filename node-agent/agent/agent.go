package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"golang.org/x/sys/unix"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// Options say how an agent works. NodeName, Volumes, Keys and NotesDir must be set.
type Options struct {
	NodeName string
	Volumes  Volumes
	Keys     *KeyRing

	// NotesDir is where the agent notes what it has done until the API server knows. It outlives the agent, and not the boot.
	NotesDir string

	Engine    Engine // default [Workers]
	Witness   bool   // captures keep KVM's dirty log, see [capture.Options]
	RecordDir string // where session records are kept; default [dirty.DefaultRecordDir]

	// OtherNamespaces permits images to be imported, restored and deleted by objects of another namespace than the images' own.
	OtherNamespaces bool

	// Slots bounds how many machines are worked on at once; default 2. Each takes as much processor as it gets.
	Slots int

	// RetryAfter is how long a task waits after its n-th failure that may pass; default 5 s, doubled each time, 2 min at most.
	RetryAfter func(n int) time.Duration

	Clock   clock.WithTicker // default the real one
	Metrics *Metrics         // default none
}

// Agent is the agent of a node.
type Agent struct {
	o      Options
	client client.Client // reads from the cache
	live   client.Reader // reads from the API server
	events events.EventRecorder
	queue  *queue

	retries retries
}

// errShutdown is the cause with which tasks end when the agent does.
var errShutdown = errors.New("the node agent is being stopped")

// errDeleted is the cause with which a task ends whose object was deleted.
var errDeleted = errors.New("the object was deleted")

// New makes an agent and adds its reconcilers to the manager. Its tasks end before the manager's Start returns.
func New(m ctrl.Manager, o Options) (*Agent, error) {
	if o.Engine == nil {
		o.Engine = Workers{}
	}
	if o.Slots <= 0 {
		o.Slots = 2
	}
	if o.Clock == nil {
		o.Clock = clock.RealClock{}
	}
	if o.RetryAfter == nil {
		o.RetryAfter = func(n int) time.Duration { return min(5*time.Second<<min(n-1, 10), 2*time.Minute) }
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics()
	}
	a := &Agent{o: o, client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("vmckpt-node-agent")}
	a.queue = newQueue(context.Background(), o.Slots, o.Metrics.queue)
	few := controller.Options{MaxConcurrentReconciles: 4}
	c := &checkpoints{a, make(chan event.GenericEvent)}
	err := ctrl.NewControllerManagedBy(m).Named("node-checkpoint").For(&vmckptv1.VMCheckpoint{}).
		WatchesRawSource(source.Channel(c.again, &handler.EnqueueRequestForObject{})).WithOptions(few).Complete(c)
	if err != nil {
		return nil, fmt.Errorf("watch checkpoints: %w", err)
	}
	r := &restores{a, make(chan event.GenericEvent)}
	err = ctrl.NewControllerManagedBy(m).Named("node-restore").For(&vmckptv1.VMRestore{}).
		WatchesRawSource(source.Channel(r.again, &handler.EnqueueRequestForObject{})).WithOptions(few).Complete(r)
	if err != nil {
		return nil, fmt.Errorf("watch restores: %w", err)
	}
	// Tasks end with the manager, and the manager waits for them.
	return a, m.Add(shutdown{a})
}

type shutdown struct{ *Agent }

func (s shutdown) Start(ctx context.Context) error {
	<-ctx.Done()
	s.queue.close(errShutdown)
	return nil
}

// Lock makes this the only agent of the node, waiting for another to end: two would work on one machine. It holds until the file is closed, by
// the end of the process if by nothing else.
func Lock(ctx context.Context, dir string) (io.Closer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock the node: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "agent.lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the node: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock the node: %w", err)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the node: another agent is at work: %w", ctx.Err())
		}
	}
}

// machineName is the key of a machine in the queue.
func machineName(namespace, vmi string) string {
	if vmi == "" {
		return ""
	}
	return namespace + "/" + vmi
}

// event tells of something that happened to an object, in plain words.
func (a *Agent) event(o client.Object, kind, reason, action, text string) {
	a.events.Eventf(o, nil, kind, reason, action, "%s", clip(text, 1000))
}

const (
	eventNormal  = corev1.EventTypeNormal
	eventWarning = corev1.EventTypeWarning
)

// clusterUID tells this cluster from another, or from what it was before etcd was lost.
func (a *Agent) clusterUID(ctx context.Context) (string, error) {
	var ns corev1.Namespace
	if err := a.live.Get(ctx, types.NamespacedName{Name: "kube-system"}, &ns); err != nil {
		return "", fmt.Errorf("read namespace kube-system, by which clusters are told apart: %w", err)
	}
	return string(ns.UID), nil
}

// goneVMIError says that a machine is not on this node, or not the one that the object was bound for.
type goneVMIError struct{ why string }

func (e *goneVMIError) Error() string { return e.why }

// findVMI reads the instance that an object was bound for.
func (a *Agent) findVMI(ctx context.Context, name types.NamespacedName, uid types.UID) (*kubevirtv1.VirtualMachineInstance, error) {
	var vmi kubevirtv1.VirtualMachineInstance
	err := a.live.Get(ctx, name, &vmi)
	switch {
	case client.IgnoreNotFound(err) != nil:
		return nil, fmt.Errorf("read VirtualMachineInstance %v: %w", name, err)
	case err != nil:
		return nil, &goneVMIError{fmt.Sprintf("VirtualMachineInstance %v is gone", name)}
	case vmi.UID != uid:
		return nil, &goneVMIError{fmt.Sprintf("VirtualMachineInstance %v was started anew", name)}
	case vmi.Status.NodeName != a.o.NodeName:
		return nil, &goneVMIError{fmt.Sprintf("VirtualMachineInstance %v has moved to node %q", name, vmi.Status.NodeName)}
	case vmi.DeletionTimestamp != nil || vmi.IsFinal():
		return nil, &goneVMIError{fmt.Sprintf("VirtualMachineInstance %v is ending", name)}
	}
	return &vmi, nil
}
