package agent_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
	"github.com/vmckpt/vmckpt/test/apiserver"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

var shared apiserver.Shared

// This binary is the agent's workers as well.
func TestMain(m *testing.M) {
	guard.Main()
	inject.Main()
	supervise.Main(jobs.All(), func(err error) string { return string(jobs.CodeOf(err)) })
	ctrl.SetLogger(logr.Discard())
	os.Exit(shared.Main(m))
}

const node = "node-a"

// bound is how long anything may take that a test waits for.
const bound = 60 * time.Second

// rig is a cluster of an API server with one namespace, where the test does what the controllers would do.
type rig struct {
	testing.TB
	client.Client
	server    *apiserver.Server
	namespace string
	records   string
	notes     string
}

func newRig(t *testing.T) *rig {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	server.InstallKubeVirt(t)
	r := &rig{TB: t, Client: server.Client(t), server: server, namespace: server.Namespace(t), records: t.TempDir(), notes: t.TempDir()}
	r.keys("one", map[string]string{"one": keyText(1)})
	return r
}

// keyText is the text of a key file.
func keyText(n byte) string { return fmt.Sprintf("secret %064x\n", n) }

// keys puts the Secret of keys in place.
func (r *rig) keys(current string, entries map[string]string) {
	r.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "vmckpt-keys"}}
	err := r.Get(r.Context(), client.ObjectKeyFromObject(secret), secret)
	if client.IgnoreNotFound(err) != nil {
		r.Fatal(err)
	}
	secret.Data, secret.StringData = nil, map[string]string{"current": current}
	for name, text := range entries {
		secret.StringData[name] = text
	}
	if err != nil {
		err = r.Create(r.Context(), secret)
	} else {
		err = r.Update(r.Context(), secret)
	}
	if err != nil {
		r.Fatal(err)
	}
}

// claim makes a claim that is bound to a directory of this machine, which it returns.
func (r *rig) claim(name string) string {
	r.Helper()
	dir := r.TempDir()
	r.claimOf(name, dir)
	return dir
}

func (r *rig) claimOf(name, dir string) {
	r.Helper()
	one := corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	mode := []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	pvc.Spec.AccessModes, pvc.Spec.Resources.Requests, pvc.Spec.VolumeName = mode, one, r.namespace+"-"+name
	r.must(r.Create(r.Context(), pvc))
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: pvc.Spec.VolumeName}}
	pv.Spec.AccessModes, pv.Spec.Capacity = mode, one
	pv.Spec.HostPath = &corev1.HostPathVolumeSource{Path: dir}
	pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: r.namespace, Name: name, UID: pvc.UID}
	r.must(r.Create(r.Context(), pv))
	pvc.Status.Phase = corev1.ClaimBound
	r.must(r.Status().Update(r.Context(), pvc))
}

// damage writes over pages of an image.
func (r *rig) damage(volume, image string) {
	r.Helper()
	files, err := filepath.Glob(filepath.Join(volume, "vmckpt/images", image, "*.pages"))
	if err != nil || len(files) != 1 {
		r.Fatal(files, err)
	}
	f, err := os.OpenFile(files[0], os.O_RDWR, 0)
	r.must(err)
	_, err = f.WriteAt([]byte("not what was written"), 5000)
	r.must(err)
	r.must(f.Close())
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// machine starts a machine that writes, and shows it.
func (r *rig) machine(name string, paused bool) (*machine.Machine, *kubevirtv1.VirtualMachineInstance) {
	r.Helper()
	m := machine.Start(r.TB.(*testing.T), machine.Options{
		Name: r.namespace + "_" + name, UUID: "dd75a760-ca42-402a-9170-c596ddd06a4e", MemoryBytes: 64 * machine.MiB, Paused: paused,
		Guest: machine.Writer{Percent: 50, Parameters: writer.Parameters{Random: true, PagesPerPass: 20, Spin: 1_000_000}},
	})
	return m, r.instance(name, m)
}

// instance shows a machine as an instance on this node.
func (r *rig) instance(name string, m *machine.Machine) *kubevirtv1.VirtualMachineInstance {
	r.Helper()
	vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	vmi.Spec.Domain.Firmware = &kubevirtv1.Firmware{UUID: types.UID(m.Options().UUID)}
	r.must(client.IgnoreAlreadyExists(r.Create(r.Context(), vmi)))
	r.must(r.Get(r.Context(), client.ObjectKeyFromObject(vmi), vmi))
	vmi.Status.NodeName, vmi.Status.Phase = node, kubevirtv1.Running
	r.must(r.Update(r.Context(), vmi)) // the type has no status subresource
	return vmi
}

// agent starts an agent, which ends with the test or by stop.
func (r *rig) agent(name string, change func(*agent.Options)) (stop func()) {
	r.Helper()
	return r.agentCounted(name, &counter{}, change)
}

func (r *rig) agentCounted(name string, calls *counter, change func(*agent.Options)) (stop func()) {
	r.Helper()
	server := r.server.Config()
	server.WrapTransport = calls.wrap
	server.QPS = -1 // as much as there is
	mine := cache.ByObject{Field: fields.OneTermEqualSelector("status.nodeName", name)}
	no := true
	m, err := ctrl.NewManager(server, ctrl.Options{
		Scheme:     r.Scheme(),
		Cache:      cache.Options{ByObject: map[client.Object]cache.ByObject{&vmckptv1.VMCheckpoint{}: mine, &vmckptv1.VMRestore{}: mine}},
		Metrics:    metricsserver.Options{BindAddress: "0"},
		Controller: config.Controller{SkipNameValidation: &no},
	})
	r.must(err)
	o := agent.Options{
		NodeName: name, RecordDir: r.records, NotesDir: r.notes,
		Volumes:    agent.LocalVolumes{Reader: m.GetAPIReader()},
		Keys:       &agent.KeyRing{Reader: m.GetAPIReader(), Secret: types.NamespacedName{Namespace: r.namespace, Name: "vmckpt-keys"}, Dir: r.TempDir()},
		RetryAfter: func(int) time.Duration { return 100 * time.Millisecond },
	}
	if change != nil {
		change(&o)
	}
	_, err = agent.New(m, o)
	r.must(err)
	ctx, cancel := context.WithCancel(context.Background())
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

// onNode shows an instance on a node.
func (r *rig) onNode(vmi *kubevirtv1.VirtualMachineInstance, node string) {
	r.Helper()
	vmi.Status.NodeName = node
	r.must(r.Update(r.Context(), vmi))
}

// checkpoint makes a checkpoint and binds it as the controller would.
func (r *rig) checkpoint(name string, vmi *kubevirtv1.VirtualMachineInstance, change func(*vmckptv1.VMCheckpoint)) *vmckptv1.VMCheckpoint {
	r.Helper()
	return r.checkpointOn(node, name, vmi, change)
}

func (r *rig) checkpointOn(node, name string, vmi *kubevirtv1.VirtualMachineInstance, change func(*vmckptv1.VMCheckpoint)) *vmckptv1.VMCheckpoint {
	r.Helper()
	c := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name, Finalizers: []string{vmckptv1.Finalizer}}}
	c.Spec.Source = vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: "vm"}
	c.Spec.Storage.ClaimName = "claim"
	if change != nil {
		change(c)
	}
	r.must(r.Create(r.Context(), c))
	c.Status.NodeName = node
	if vmi != nil {
		c.Status.VMIName, c.Status.VMIUID = vmi.Name, vmi.UID
	}
	c.Waiting(vmckptv1.ReasonBound, "bound", time.Now())
	r.must(r.Status().Update(r.Context(), c))
	return c
}

// restore makes a restore of an image on the claim and binds it.
func (r *rig) restore(name, image string, vmi *kubevirtv1.VirtualMachineInstance, change func(*vmckptv1.VMRestore)) *vmckptv1.VMRestore {
	r.Helper()
	o := r.unbound(name, image, vmi, change)
	r.bind(o, vmi)
	return o
}

func (r *rig) unbound(name, image string, vmi *kubevirtv1.VirtualMachineInstance, change func(*vmckptv1.VMRestore)) *vmckptv1.VMRestore {
	r.Helper()
	o := &vmckptv1.VMRestore{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name, Finalizers: []string{vmckptv1.Finalizer}}}
	o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "claim", Image: image}
	o.Spec.Target = vmckptv1.RestoreTarget{VMReference: vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: vmi.Name}}
	if change != nil {
		change(o)
	}
	r.must(r.Create(r.Context(), o))
	return o
}

func (r *rig) bind(o *vmckptv1.VMRestore, vmi *kubevirtv1.VirtualMachineInstance) {
	r.Helper()
	r.bindOn(node, o, vmi)
}

func (r *rig) bindOn(node string, o *vmckptv1.VMRestore, vmi *kubevirtv1.VirtualMachineInstance) {
	r.Helper()
	o.Status.NodeName, o.Status.VMIName, o.Status.VMIUID = node, vmi.Name, vmi.UID
	o.Status.Image = o.Spec.Source.Volume
	o.Waiting(vmckptv1.ReasonBound, "bound", time.Now())
	r.must(r.Status().Update(r.Context(), o))
}

// wait waits until the object is as it should be, and keeps the object up to date.
func wait[T client.Object](r *rig, o T, what string, is func(T) bool) {
	r.Helper()
	until := time.Now().Add(bound)
	for {
		err := r.Get(r.Context(), client.ObjectKeyFromObject(o), o)
		if err == nil && is(o) {
			return
		}
		if time.Now().After(until) {
			r.Fatalf("waited for %s: %+v (%v)", what, o, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// gone waits until the object is no more.
func (r *rig) gone(o client.Object) {
	r.Helper()
	until := time.Now().Add(bound)
	for {
		err := r.Get(r.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return
		}
		if time.Now().After(until) {
			r.Fatalf("%s is still there: %+v (%v)", o.GetName(), o, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func done(c *vmckptv1.VMCheckpoint) bool { return c.Done() }

// message is that of the condition Ready.
func message(conditions []metav1.Condition) string {
	if c := meta.FindStatusCondition(conditions, vmckptv1.ConditionReady); c != nil {
		return c.Reason + ": " + c.Message
	}
	return ""
}

// images lists what is in the repository on a volume.
func images(t testing.TB, volume string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(volume, "vmckpt", "images"))
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}
