package operator

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"golang.org/x/sys/unix"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/test/apiserver"
	"github.com/vmckpt/vmckpt/test/guest/writer"
	"github.com/vmckpt/vmckpt/test/machine"
)

var shared apiserver.Shared

// programs is the directory with the operator's programs, built for this run.
var programs string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctrl.SetLogger(logr.Discard())
	dir, err := os.MkdirTemp("", "vmckpt-operator-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir, "github.com/vmckpt/vmckpt/cmd/manager", "github.com/vmckpt/vmckpt/cmd/node-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		return 1
	}
	programs = dir
	return shared.Main(m)
}

const (
	system = "vmckpt-system"
	node   = "node-a"

	// bound is how long anything may take that a test waits for.
	bound = 90 * time.Second
)

// rig is a cluster with the operator installed, and one namespace of a user's.
type rig struct {
	*testing.T
	client.Client
	server    *apiserver.Server
	namespace string
	dir       string // the node's: run and record directories, logs, volumes
	config    map[string]string
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, server: shared.Server(t), dir: t.TempDir(), config: map[string]string{}}
	r.Client = r.server.Client(t)
	r.install()
	r.namespace = r.server.Namespace(t)
	return r
}

// install is kubectl apply of what a cluster's administrator applies, without the manager's pods.
func (r *rig) install() {
	r.Helper()
	r.server.InstallKubeVirt(r)
	r.server.Kubectl(r, "apply", "--kustomize", "../../config/crd")
	r.server.Kubectl(r, "wait", "--for", "condition=Established", "crd/vmcheckpoints.vmckpt.io", "crd/vmrestores.vmckpt.io")
	r.server.Kubectl(r, "apply", "--kustomize", "../../config/rbac")
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{"kubernetes.io/hostname": node, "kubevirt.io/schedulable": "true"}}}
	r.must(client.IgnoreAlreadyExists(r.Create(r.Context(), n)))
	for _, account := range []string{"vmckpt-manager", "vmckpt-node-agent"} {
		path := filepath.Join(r.dir, account+".kubeconfig")
		r.must(writeKubeconfig(path, r.server.ServiceAccount(r, system, account)))
		r.config[account] = path
	}
}

func writeKubeconfig(path string, config *rest.Config) error {
	k := clientcmdapi.NewConfig()
	k.Clusters["c"] = &clientcmdapi.Cluster{Server: config.Host, CertificateAuthorityData: config.CAData}
	k.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: config.BearerToken}
	k.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	k.CurrentContext = "c"
	return clientcmd.WriteToFile(*k, path)
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// program is one of the operator's, at work.
type program struct {
	r       *rig
	cmd     *exec.Cmd
	log     string
	metrics string // address
	probes  string
}

func (r *rig) start(name string, args ...string) *program {
	r.Helper()
	p := &program{r: r, log: filepath.Join(r.dir, fmt.Sprintf("%s-%d.log", name, time.Now().UnixNano())), metrics: freeAddress(r), probes: freeAddress(r)}
	log, err := os.Create(p.log)
	r.must(err)
	defer log.Close()
	p.cmd = exec.Command(filepath.Join(programs, name), append(args, "--kubeconfig", r.config["vmckpt-"+name], "--namespace", system,
		"--metrics-bind-address", p.metrics, "--health-probe-bind-address", p.probes, "--log-format", "text", "--verbose")...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	r.must(p.cmd.Start())
	r.Cleanup(func() {
		p.kill()
		if r.Failed() {
			if text, err := os.ReadFile(p.log); err == nil {
				r.Logf("%s:\n%s", name, text[max(0, len(text)-6000):])
			}
		}
	})
	return p
}

func (r *rig) manager() *program { return r.start("manager", "--leader-elect-lease-duration", "5s") }

func (r *rig) agent() *program {
	return r.start("node-agent", "--node-name", node, "--run-dir", filepath.Join(r.dir, "run"), "--record-dir", filepath.Join(r.dir, "records"))
}

// kill is kill -9.
func (p *program) kill() {
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended
	p.cmd.Wait()         //nolint:errcheck // killed
}

// end asks it to end in order, and fails unless it does.
func (p *program) end() {
	p.r.Helper()
	p.r.must(p.cmd.Process.Signal(unix.SIGTERM))
	stop := time.AfterFunc(bound, func() { p.cmd.Process.Kill() }) //nolint:errcheck // shows in its end
	defer stop.Stop()
	if err := p.cmd.Wait(); err != nil {
		p.r.Errorf("%s did not end in order: %v", p.cmd.Path, err)
	}
}

// get reads from one of its ports.
func (p *program) get(address, path string) string {
	p.r.Helper()
	for until := time.Now().Add(bound); ; time.Sleep(50 * time.Millisecond) {
		response, err := http.Get("http://" + address + path)
		if err == nil {
			text, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err == nil && response.StatusCode == http.StatusOK {
				return string(text)
			}
		}
		if time.Now().After(until) {
			p.r.Fatalf("%s%s of %s: %v", address, path, p.cmd.Path, err)
		}
	}
}

// claim makes the claim "claim" on a directory of this machine.
func (r *rig) claim(dir string) {
	r.Helper()
	pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "claim"}}
	pvc.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	pvc.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	pvc.Spec.VolumeName = r.namespace + "-claim"
	r.must(r.Create(r.Context(), pvc))
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: pvc.Spec.VolumeName}}
	pv.Spec.AccessModes, pv.Spec.Capacity = pvc.Spec.AccessModes, pvc.Spec.Resources.Requests
	pv.Spec.Local = &corev1.LocalVolumeSource{Path: dir}
	pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: []string{node}}},
	}}}}
	pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: r.namespace, Name: "claim", UID: pvc.UID}
	r.must(r.Create(r.Context(), pv))
	pvc.Status.Phase = corev1.ClaimBound
	r.must(r.Status().Update(r.Context(), pvc))
}

const machineUUID = "dd75a760-ca42-402a-9170-c596ddd06a4e"

// machine starts a machine that writes.
func (r *rig) machine(bytes uint64, paused bool) *machine.Machine {
	r.Helper()
	return machine.Start(r.T, machine.Options{
		Name: r.namespace + "_vm", UUID: machineUUID, MemoryBytes: bytes, Paused: paused,
		Guest: machine.Writer{Percent: 60, Parameters: writer.Parameters{Random: true, Whole: true, PagesPerPass: 100, Spin: 3_000_000}},
	})
}

// instance shows it as an instance.
func (r *rig) instance(paused bool) *kubevirtv1.VirtualMachineInstance {
	r.Helper()
	vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "vm"}}
	vmi.Spec.Domain.Firmware = &kubevirtv1.Firmware{UUID: types.UID(machineUUID)}
	vmi.Status.NodeName, vmi.Status.Phase = node, kubevirtv1.Running
	if paused {
		vmi.Status.Conditions = []kubevirtv1.VirtualMachineInstanceCondition{{Type: kubevirtv1.VirtualMachineInstancePaused, Status: corev1.ConditionTrue}}
	}
	r.must(r.Create(r.Context(), vmi))
	return vmi
}

func (r *rig) noInstance() {
	r.Helper()
	r.must(client.IgnoreNotFound(r.Delete(r.Context(), &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "vm"}})))
}

func (r *rig) checkpoint(name string) *vmckptv1.VMCheckpoint {
	r.Helper()
	c := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	c.Spec.Source = vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: "vm"}
	c.Spec.Storage.ClaimName = "claim"
	r.must(r.Create(r.Context(), c))
	return c
}

func (r *rig) restore(name, from string, mode vmckptv1.RestoreMode) *vmckptv1.VMRestore {
	r.Helper()
	o := &vmckptv1.VMRestore{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name}}
	o.Spec.Source.CheckpointName = from
	o.Spec.Target = vmckptv1.RestoreTarget{VMReference: vmckptv1.VMReference{Kind: vmckptv1.KindVirtualMachineInstance, Name: "vm"}, Mode: mode}
	r.must(r.Create(r.Context(), o))
	return o
}

// wait waits until an object, kept up to date, is as it should be.
func wait[T client.Object](r *rig, o T, what string, is func(T) bool) {
	r.Helper()
	for until := time.Now().Add(bound); ; time.Sleep(10 * time.Millisecond) {
		err := r.Get(r.Context(), client.ObjectKeyFromObject(o), o)
		if err == nil && is(o) {
			return
		}
		if time.Now().After(until) {
			r.Fatalf("waited for %s: %+v (%v)", what, o, err)
		}
	}
}

func (r *rig) ready(c *vmckptv1.VMCheckpoint, reason string) {
	r.Helper()
	wait(r, c, c.Name+" to be ready", (*vmckptv1.VMCheckpoint).Done)
	if got := message(c.Status.Conditions); !c.Ready() || !strings.HasPrefix(got, reason+": ") {
		r.Fatalf("%s: %s", c.Name, got)
	}
}

func message(conditions []metav1.Condition) string {
	if c := meta.FindStatusCondition(conditions, vmckptv1.ConditionReady); c != nil {
		return c.Reason + ": " + c.Message
	}
	return ""
}

// goesOn fails unless the guest is at work, past a number of passes, and never found a page that it did not write.
func goesOn(t *testing.T, m *machine.Machine, passes uint64) writer.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	at, _, err := m.WriterStatus(ctx)
	if err != nil {
		t.Fatal(err)
	}
	now, err := m.WaitWriter(ctx, func(s writer.Status) bool { return s.Passes > max(at.Passes, passes) })
	if err != nil || now.Errors != 0 {
		t.Fatalf("the guest went from %+v to %+v: %v", at, now, err)
	}
	return now
}

// freeAddress is an address of this host that nobody listens at.
func freeAddress(r *rig) string {
	r.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	r.must(err)
	defer l.Close()
	return l.Addr().String()
}
