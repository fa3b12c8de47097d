package checkpoint_test

import (
	"context"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/cached"
	"github.com/vmckpt/vmckpt/controllers/checkpoint"
	"github.com/vmckpt/vmckpt/controllers/restore"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	os.Exit(shared.Main(m))
}

// bound is how long anything may take that a test waits for.
const bound = 60 * time.Second

// rig is an API server with the controllers at work on it, and one namespace. What agents and KubeVirt would do, the test does.
type rig struct {
	*testing.T
	client.Client
	server    *apiserver.Server
	namespace string
	patience  time.Duration // how long anything is waited for
	calls     atomic.Int64  // writes of the controllers
}

func newRig(t *testing.T) *rig {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	server.InstallKubeVirt(t)
	r := &rig{T: t, Client: server.Client(t), server: server, namespace: server.Namespace(t), patience: bound}
	for _, name := range []string{"node-a", "node-b"} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name, "kubevirt.io/schedulable": "true"}}}
		r.must(client.IgnoreAlreadyExists(r.Create(t.Context(), n)))
	}
	return r
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// controllers starts them, until the test ends or stop is called.
func (r *rig) controllers(election bool) (stop func()) {
	r.Helper()
	server := r.server.Config()
	server.QPS = -1
	server.WrapTransport = func(next http.RoundTripper) http.RoundTripper {
		return roundTrip(func(q *http.Request) (*http.Response, error) {
			if q.Method != http.MethodGet && strings.Contains(q.URL.Path, "/vmckpt.io/") {
				r.calls.Add(1)
			}
			return next.RoundTrip(q)
		})
	}
	// Who leads gives the lease back at its end; the API server may be gone for as long as a busy machine takes to start one.
	lease, renew, retry := 60*time.Second, 45*time.Second, 500*time.Millisecond
	no := true
	m, err := ctrl.NewManager(server, ctrl.Options{
		Scheme: r.Scheme(), Cache: cached.Options(), Metrics: metricsserver.Options{BindAddress: "0"}, Controller: config.Controller{SkipNameValidation: &no},
		LeaderElection: election, LeaderElectionID: "test", LeaderElectionNamespace: r.namespace, LeaderElectionReleaseOnCancel: true,
		LeaseDuration: &lease, RenewDeadline: &renew, RetryPeriod: &retry,
	})
	r.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	r.must((&checkpoint.Reconciler{Client: m.GetClient(), Live: m.GetAPIReader(), Events: m.GetEventRecorder("vmckpt"), Clock: clock.RealClock{}}).SetupWithManager(ctx, m))
	r.must((&restore.Reconciler{Client: m.GetClient(), Live: m.GetAPIReader(), Events: m.GetEventRecorder("vmckpt"), Clock: clock.RealClock{}}).SetupWithManager(ctx, m))
	ended := make(chan error, 1)
	go func() { ended <- m.Start(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			r.Error(err)
		}
	})
	r.Cleanup(stop)
	return stop
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// node makes a node of this test's own, with no other's machines on it.
func (r *rig) node(name string) *corev1.Node {
	r.Helper()
	name = r.namespace + "-" + name
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name, "kubevirt.io/schedulable": "true"}}}
	r.must(r.Create(r.Context(), n))
	r.Cleanup(func() { r.must(client.IgnoreNotFound(r.Delete(context.Background(), n))) })
	r.answers(n, true)
	return n
}

// answers says whether a node's kubelet does.
func (r *rig) answers(n *corev1.Node, ready bool) {
	r.Helper()
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	r.must(r.Status().Update(r.Context(), n))
}

// event waits for an event of an object that says something.
func (r *rig) event(o client.Object, kind, part string) {
	r.Helper()
	var events corev1.EventList
	for until := time.Now().Add(r.patience); ; time.Sleep(20 * time.Millisecond) {
		r.must(r.List(r.Context(), &events, client.InNamespace(r.namespace)))
		for _, e := range events.Items {
			if e.InvolvedObject.Name == o.GetName() && e.Type == kind && strings.Contains(e.Message, part) {
				return
			}
		}
		if time.Now().After(until) {
			r.Fatalf("no event of %s says %q", o.GetName(), part)
		}
	}
}

// claim makes a claim, bound to a volume that some nodes reach (a,b), or all for "".
func (r *rig) claim(name, node string) *corev1.PersistentVolumeClaim {
	r.Helper()
	pvc := r.unboundClaim(name)
	r.volume(pvc, node)
	r.bindClaim(pvc)
	return pvc
}

// volume makes the volume of a claim.
func (r *rig) volume(pvc *corev1.PersistentVolumeClaim, node string) *corev1.PersistentVolume {
	r.Helper()
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: pvc.Spec.VolumeName}}
	pv.Spec.AccessModes, pv.Spec.Capacity = pvc.Spec.AccessModes, pvc.Spec.Resources.Requests
	pv.Spec.HostPath = &corev1.HostPathVolumeSource{Path: "/volume"}
	pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: r.namespace, Name: pvc.Name, UID: pvc.UID}
	if node != "" {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: strings.Split(node, ",")}},
		}}}}
	}
	r.must(r.Create(r.Context(), pv))
	return pv
}

func (r *rig) unboundClaim(name string) *corev1.PersistentVolumeClaim {
	r.Helper()
	pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	pvc.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	pvc.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	pvc.Spec.VolumeName = r.namespace + "-" + name
	r.must(r.Create(r.Context(), pvc))
	return pvc
}

func (r *rig) bindClaim(pvc *corev1.PersistentVolumeClaim) {
	r.Helper()
	pvc.Status.Phase = corev1.ClaimBound
	r.must(r.Status().Update(r.Context(), pvc))
}

// instance makes or changes an instance; a new one runs on node-a.
func (r *rig) instance(name string, change func(*kubevirtv1.VirtualMachineInstance)) *kubevirtv1.VirtualMachineInstance {
	r.Helper()
	vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	err := r.Get(r.Context(), client.ObjectKeyFromObject(vmi), vmi)
	r.must(client.IgnoreNotFound(err))
	if err != nil {
		vmi.Status.NodeName, vmi.Status.Phase = "node-a", kubevirtv1.Running
	}
	if change != nil {
		change(vmi)
	}
	if err != nil {
		r.must(r.Create(r.Context(), vmi))
	} else {
		r.must(r.Update(r.Context(), vmi))
	}
	return vmi
}

func (r *rig) checkpoint(name string, change func(*vmckptv1.VMCheckpoint)) *vmckptv1.VMCheckpoint {
	r.Helper()
	c := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	c.Spec.Source = vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: "vm"}
	c.Spec.Storage.ClaimName = "claim"
	if change != nil {
		change(c)
	}
	r.must(r.Create(r.Context(), c))
	return c
}

func (r *rig) restore(name, from string, change func(*vmckptv1.VMRestore)) *vmckptv1.VMRestore {
	r.Helper()
	o := &vmckptv1.VMRestore{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	o.Spec.Source.CheckpointName = from
	o.Spec.Target = vmckptv1.RestoreTarget{VMReference: vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: "vm"}, Mode: vmckptv1.RestoreInPlace}
	if change != nil {
		change(o)
	}
	r.must(r.Create(r.Context(), o))
	return o
}

// says waits until the object's condition Ready has a reason and a part of a message.
func (r *rig) says(o client.Object, reason, part string) {
	r.Helper()
	r.wait(o, reason+": "+part, func() bool {
		var conditions []metav1.Condition
		switch o := o.(type) {
		case *vmckptv1.VMCheckpoint:
			conditions = o.Status.Conditions
		case *vmckptv1.VMRestore:
			conditions = o.Status.Conditions
		}
		c := meta.FindStatusCondition(conditions, vmckptv1.ConditionReady)
		return c != nil && c.Reason == reason && strings.Contains(c.Message, part)
	})
}

// wait waits until the object, kept up to date, is as it should be.
func (r *rig) wait(o client.Object, what string, is func() bool) {
	r.Helper()
	for until := time.Now().Add(r.patience); ; time.Sleep(20 * time.Millisecond) {
		err := r.Get(r.Context(), client.ObjectKeyFromObject(o), o)
		if err == nil && is() {
			return
		}
		if time.Now().After(until) {
			r.Fatalf("waited for %s: %+v (%v)", what, o, err)
		}
	}
}

func (r *rig) gone(o client.Object) {
	r.Helper()
	for until := time.Now().Add(r.patience); ; time.Sleep(20 * time.Millisecond) {
		err := r.Get(r.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return
		}
		if time.Now().After(until) {
			r.Fatalf("%s is still there: %+v (%v)", o.GetName(), o, err)
		}
	}
}

// agent does to a bound checkpoint what an agent would.
func (r *rig) agent(c *vmckptv1.VMCheckpoint, do func(*vmckptv1.VMCheckpoint)) {
	r.Helper()
	r.must(r.Get(r.Context(), client.ObjectKeyFromObject(c), c))
	do(c)
	r.must(r.Status().Update(r.Context(), c))
}

// captured is the end of a capture.
func captured(c *vmckptv1.VMCheckpoint) {
	c.Status.Image = &vmckptv1.CheckpointImage{Name: c.Name, Path: "vmckpt/images/" + c.Name, Digest: strings.Repeat("1", 64), Kind: vmckptv1.ImageBase}
	c.Succeeded(vmckptv1.ReasonCaptured, "captured", time.Now())
}
