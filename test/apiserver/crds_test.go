package apiserver_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// machineSpec is what KubeVirt runs in the tests below.
func machineSpec() kubevirtv1.VirtualMachineInstanceSpec {
	return kubevirtv1.VirtualMachineInstanceSpec{
		Domain: kubevirtv1.DomainSpec{
			CPU:      &kubevirtv1.CPU{Cores: 2, Sockets: 1, Threads: 1, Model: "Westmere"},
			Memory:   &kubevirtv1.Memory{Guest: new(resource.MustParse("1Gi"))},
			Machine:  &kubevirtv1.Machine{Type: "q35"},
			Firmware: &kubevirtv1.Firmware{UUID: "dd75a760-ca42-402a-9170-c596ddd06a4e"},
			Devices: kubevirtv1.Devices{
				Disks: []kubevirtv1.Disk{{
					Name:       "root",
					DiskDevice: kubevirtv1.DiskDevice{Disk: &kubevirtv1.DiskTarget{Bus: kubevirtv1.DiskBusVirtio}},
				}},
				Interfaces: []kubevirtv1.Interface{*kubevirtv1.DefaultMasqueradeNetworkInterface()},
			},
		},
		NodeSelector:  map[string]string{"zone": "a"},
		StartStrategy: new(kubevirtv1.StartStrategyPaused),
		Networks:      []kubevirtv1.Network{*kubevirtv1.DefaultPodNetwork()},
		Volumes: []kubevirtv1.Volume{{
			Name: "root",
			VolumeSource: kubevirtv1.VolumeSource{PersistentVolumeClaim: &kubevirtv1.PersistentVolumeClaimVolumeSource{
				PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "vm-disk"},
			}},
		}},
	}
}

func TestVirtualMachineInstanceIsKeptWhole(t *testing.T) {
	server := shared.Server(t)
	server.InstallKubeVirt(t)
	admin := server.Client(t)
	vmi := &kubevirtv1.VirtualMachineInstance{Spec: machineSpec()}
	vmi.Namespace, vmi.Name = server.Namespace(t), "vm"
	if err := admin.Create(t.Context(), vmi); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(machineSpec(), vmi.Spec, equal); diff != "" {
		t.Errorf("the spec changed as it was created (-sent +answered):\n%s", diff)
	}

	created := vmi.Generation
	status := kubevirtv1.VirtualMachineInstanceStatus{
		Phase:      kubevirtv1.Running,
		NodeName:   "node1",
		ActivePods: map[types.UID]string{"d2b4d1de-131e-4f2e-abab-7d88cd06841a": "node1"},
		Conditions: []kubevirtv1.VirtualMachineInstanceCondition{{
			Type: kubevirtv1.VirtualMachineInstanceReady, Status: corev1.ConditionTrue,
			LastTransitionTime: metav1.NewTime(time.Unix(1_700_000_000, 0)),
		}},
		Interfaces: []kubevirtv1.VirtualMachineInstanceNetworkInterface{{Name: "default", IP: "10.88.1.8", MAC: "aa:6b:2c:75:0c:7f"}},
		Machine:    &kubevirtv1.Machine{Type: "pc-q35-10.0"},
		Memory:     &kubevirtv1.MemoryStatus{GuestCurrent: new(resource.MustParse("1Gi"))},
	}
	vmi.Status = status
	if err := admin.Status().Update(t.Context(), vmi.DeepCopy()); !apierrors.IsNotFound(err) {
		t.Errorf("a VirtualMachineInstance has no status subresource, and updating it says %v, want not found", err)
	}
	if err := admin.Update(t.Context(), vmi); err != nil {
		t.Fatal(err)
	}
	if vmi.Generation != created+1 {
		t.Errorf("a new status changes the generation from %d to %d, want one more", created, vmi.Generation)
	}

	got := &kubevirtv1.VirtualMachineInstance{}
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(vmi), got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(machineSpec(), got.Spec, equal); diff != "" {
		t.Errorf("the spec changed (-written +read):\n%s", diff)
	}
	if diff := cmp.Diff(status, got.Status, equal); diff != "" {
		t.Errorf("the status changed (-written +read):\n%s", diff)
	}

	// What kubectl shows of it, by the short name.
	out := server.Kubectl(t, "get", "vmi", "--namespace", vmi.Namespace)
	header, row, _ := strings.Cut(out, "\n")
	if want := []string{"NAME", "AGE", "PHASE", "IP", "NODENAME", "READY"}; !cmp.Equal(strings.Fields(header), want) {
		t.Errorf("kubectl's columns are %q, want %q", strings.Fields(header), want)
	}
	columns := strings.Fields(row)
	if want := []string{"Running", "10.88.1.8", "node1", "True"}; len(columns) != 6 || !cmp.Equal(columns[2:], want) {
		t.Errorf("kubectl shows %q, want %q at the end", columns, want)
	}
}

func TestVirtualMachineHasAStatusOfItsOwn(t *testing.T) {
	server := shared.Server(t)
	server.InstallKubeVirt(t)
	admin := server.Client(t)
	vm := &kubevirtv1.VirtualMachine{Spec: kubevirtv1.VirtualMachineSpec{
		RunStrategy: new(kubevirtv1.RunStrategyAlways),
		Template:    &kubevirtv1.VirtualMachineInstanceTemplateSpec{Spec: machineSpec()},
	}}
	vm.Spec.Template.ObjectMeta.Labels = map[string]string{"app": "database"}
	vm.Namespace, vm.Name = server.Namespace(t), "vm"
	spec := *vm.Spec.DeepCopy()
	if err := admin.Create(t.Context(), vm); err != nil {
		t.Fatal(err)
	}
	created := vm.Generation
	vm.Status = kubevirtv1.VirtualMachineStatus{
		Created: true, Ready: true, PrintableStatus: kubevirtv1.VirtualMachineStatusRunning,
		RunStrategy: kubevirtv1.RunStrategyAlways,
	}
	status := *vm.Status.DeepCopy()
	if err := admin.Status().Update(t.Context(), vm); err != nil {
		t.Fatal(err)
	}

	got := &kubevirtv1.VirtualMachine{}
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(vm), got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(spec, got.Spec, equal); diff != "" {
		t.Errorf("the spec changed (-written +read):\n%s", diff)
	}
	if diff := cmp.Diff(status, got.Status, equal); diff != "" {
		t.Errorf("the status changed (-written +read):\n%s", diff)
	}
	if got.Generation != created {
		t.Errorf("a new status changes the generation from %d to %d, want none", created, got.Generation)
	}
}

func TestWhatKubeVirtRequiresIsRequired(t *testing.T) {
	server := shared.Server(t)
	server.InstallKubeVirt(t)
	admin := server.Client(t)
	namespace := server.Namespace(t)
	for name, object := range map[string]map[string]any{
		"VirtualMachineInstance without devices": {"kind": "VirtualMachineInstance", "spec": map[string]any{"domain": map[string]any{}}},
		"VirtualMachineInstance without domain":  {"kind": "VirtualMachineInstance", "spec": map[string]any{}},
		"VirtualMachine without template":        {"kind": "VirtualMachine", "spec": map[string]any{}},
		"migration without spec":                 {"kind": "VirtualMachineInstanceMigration"},
	} {
		t.Run(name, func(t *testing.T) {
			u := &unstructured.Unstructured{Object: object}
			u.SetAPIVersion("kubevirt.io/v1")
			u.SetNamespace(namespace)
			u.SetName("incomplete")
			if err := admin.Create(t.Context(), u); !apierrors.IsInvalid(err) {
				t.Errorf("it says %v, want invalid", err)
			}
		})
	}
}

func TestCRDsOfADirectoryAreServed(t *testing.T) {
	const crd = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: lamps.test.example.com
spec:
  group: test.example.com
  scope: Namespaced
  names: {kind: Lamp, listKind: LampList, singular: lamp, plural: lamps}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            properties:
              colour: {type: string, enum: [green, red]}
`
	server := shared.Server(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "lamps.yaml"), []byte(crd), 0o600); err != nil {
		t.Fatal(err)
	}
	server.InstallCRDs(t, dir)
	server.InstallCRDs(t, dir) // is no error
	admin := server.Client(t)
	namespace := server.Namespace(t)
	for colour, want := range map[string]func(error) bool{
		"green": func(err error) bool { return err == nil },
		"blue":  apierrors.IsInvalid,
	} {
		lamp := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"colour": colour}}}
		lamp.SetAPIVersion("test.example.com/v1")
		lamp.SetKind("Lamp")
		lamp.SetNamespace(namespace)
		lamp.SetName(colour)
		if err := admin.Create(t.Context(), lamp); !want(err) {
			t.Errorf("creating a lamp that is %s says %v", colour, err)
		}
	}
}

// equal compares as Kubernetes does: 1Gi is 1024Mi, a time is the same in each zone, and an empty list is none.
var equal = cmp.Options{
	cmp.Comparer(func(a, b resource.Quantity) bool { return a.Cmp(b) == 0 }),
	cmp.Comparer(func(a, b metav1.Time) bool { return a.Equal(&b) }),
	cmpopts.EquateEmpty(),
}
