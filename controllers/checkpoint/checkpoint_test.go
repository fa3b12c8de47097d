package checkpoint_test

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestWaits for all that a checkpoint needs, one thing after the other, and is bound when it is there.
func TestWaits(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	c := r.checkpoint("first", func(c *vmckptv1.VMCheckpoint) { c.Spec.Source.Kind = vmckptv1.KindVirtualMachine })
	r.says(c, vmckptv1.ReasonWaitingForVM, "there is no virtual machine "+r.namespace+"/vm; the checkpoint is taken when it runs and stays on its node, and nothing is captured until then")
	if c.Status.Phase != vmckptv1.CheckpointPending || len(c.Finalizers) != 0 || c.Status.ObservedGeneration != c.Generation {
		t.Errorf("%+v", c)
	}
	owner := &kubevirtv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "vm"}}
	owner.Spec.Template = &kubevirtv1.VirtualMachineInstanceTemplateSpec{}
	r.must(r.Create(t.Context(), owner))
	r.says(c, vmckptv1.ReasonWaitingForVM, "does not run")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.Phase = kubevirtv1.Scheduling })
	r.says(c, vmckptv1.ReasonWaitingForVM, "does not belong to the VirtualMachine")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) {
		vmi.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, kubevirtv1.VirtualMachineGroupVersionKind)}
	})
	r.says(c, vmckptv1.ReasonWaitingForVM, "does not run yet (phase Scheduling)")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) {
		vmi.Status.Phase = kubevirtv1.Running
		vmi.Status.MigrationState = &kubevirtv1.VirtualMachineInstanceMigrationState{}
	})
	r.says(c, vmckptv1.ReasonMigrating, "is being migrated")
	r.says(r.restore("stuck", "nothing", nil), vmckptv1.ReasonWaiting, "there is no checkpoint nothing") // nobody waits for this one
	r.claim("images", "")
	back := r.restore("back", "", func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "images", Image: "old"}
	})
	r.says(back, vmckptv1.ReasonMigrating, "")
	vmi := r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.MigrationState.Completed = true })
	r.says(c, vmckptv1.ReasonRestoring, "restore back of virtual machine vm comes first")
	r.must(r.Delete(t.Context(), back))
	r.says(c, vmckptv1.ReasonClaim, "claim "+r.namespace+"/claim is not there")
	pvc := r.unboundClaim("claim")
	r.says(c, vmckptv1.ReasonClaim, "is not bound to a volume yet")
	r.bindClaim(pvc)
	r.says(c, vmckptv1.ReasonClaim, "has a volume that is gone")
	r.must(r.Delete(t.Context(), pvc))
	r.must(r.Get(t.Context(), client.ObjectKeyFromObject(pvc), pvc))
	pvc.Finalizers = nil // the one that Kubernetes puts on, and takes off when no pod uses it
	r.must(r.Update(t.Context(), pvc))
	r.gone(pvc)
	r.claim("claim", "node-b")
	r.says(c, vmckptv1.ReasonClaim, "cannot be reached from node node-a, where the virtual machine is (volume "+r.namespace+"-claim is for kubernetes.io/hostname In node-b)")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = "node-b" })
	r.says(c, vmckptv1.ReasonBound, "bound to node node-b")
	if s := c.Status; len(c.Finalizers) != 1 || s.NodeName != "node-b" || s.VMIName != "vm" || s.VMIUID != vmi.UID || s.Phase != vmckptv1.CheckpointBound {
		t.Errorf("%+v", s)
	}

	// Given back, it is bound anew: to where the machine is now.
	r.agent(c, func(c *vmckptv1.VMCheckpoint) {
		c.Status.NodeName, c.Status.VMIName, c.Status.VMIUID = "", "", ""
		c.Waiting(vmckptv1.ReasonWaitingForVM, "gone", time.Now())
	})
	r.says(c, vmckptv1.ReasonBound, "bound to node node-b")

	r.event(c, corev1.EventTypeNormal, "bound to node node-b")
}

// TestRefused at once is what KubeVirt's objects show to be impossible, with all the reasons.
func TestRefused(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.claim("claim", "")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) {
		d := &vmi.Spec.Domain
		d.Devices.HostDevices = []kubevirtv1.HostDevice{{Name: "card", DeviceName: "vendor/card"}, {Name: "stick", DeviceName: "vendor/usb-stick"}}
		d.Devices.GPUs = []kubevirtv1.GPU{{Name: "gpu", DeviceName: "vendor/gpu"}}
		d.Devices.Interfaces = []kubevirtv1.Interface{{Name: "fast", InterfaceBindingMethod: kubevirtv1.InterfaceBindingMethod{SRIOV: &kubevirtv1.InterfaceSRIOV{}}}}
		d.Devices.Filesystems = []kubevirtv1.Filesystem{{Name: "share", Virtiofs: &kubevirtv1.FilesystemVirtiofs{}}}
		d.LaunchSecurity = &kubevirtv1.LaunchSecurity{SEV: &kubevirtv1.SEV{}}
	})
	c := r.checkpoint("first", nil)
	r.says(c, vmckptv1.ReasonRefused, "cannot be captured truly")
	for _, part := range []string{
		"host device card is hardware of the node (vendor/card)", "host device stick is hardware of the node (vendor/usb-stick)",
		"GPU gpu is hardware of the node (vendor/gpu)", "interface fast is SR-IOV", "file system share is shared by virtiofs", "encrypted by the processor",
	} {
		if !strings.Contains(c.Status.Conditions[0].Message, part) {
			t.Errorf("%q is not in %q", part, c.Status.Conditions[0].Message)
		}
	}
	if !c.Done() || c.Ready() || c.Status.Phase != vmckptv1.CheckpointFailed || c.Status.NodeName != "" {
		t.Errorf("%+v", c.Status)
	}
	block := corev1.PersistentVolumeBlock
	pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "device"}}
	pvc.Spec = r.unboundClaim("template").Spec
	pvc.Spec.VolumeMode, pvc.Spec.VolumeName = &block, "device"
	r.must(r.Create(t.Context(), pvc))
	r.bindClaim(pvc)
	plain := r.instance("plain", nil)
	onDevice := r.checkpoint("on-device", func(c *vmckptv1.VMCheckpoint) { c.Spec.Source.Name, c.Spec.Storage.ClaimName = plain.Name, "device" })
	r.says(onDevice, vmckptv1.ReasonClaim, "is a block device, and images need a file system")
}

// TestImport needs no machine: any node that reaches the claim will do.
func TestImport(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	imports := func(c *vmckptv1.VMCheckpoint) { c.Spec.Import = &vmckptv1.Import{Image: "old"} }
	c := r.checkpoint("first", imports)
	r.says(c, vmckptv1.ReasonClaim, "is not there")
	r.claim("claim", "node-b")
	r.says(c, vmckptv1.ReasonBound, "bound to node node-b")
	r.claim("elsewhere", "node-z")
	lost := r.checkpoint("lost", func(c *vmckptv1.VMCheckpoint) {
		imports(c)
		c.Spec.Storage.ClaimName = "elsewhere"
	})
	r.says(lost, vmckptv1.ReasonClaim, "no node that runs virtual machines reaches the volume")
}

// TestDeleted in each phase: who takes the finalizer off.
func TestDeleted(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	waiting := r.checkpoint("waiting", nil)
	r.says(waiting, vmckptv1.ReasonWaitingForVM, "")
	r.must(r.Delete(t.Context(), waiting))
	r.gone(waiting)

	r.claim("claim", "")
	r.instance("vm", nil)
	mine := map[string]*vmckptv1.VMCheckpoint{}
	for _, name := range []string{"bound", "bound-kept", "begun", "begun-kept", "ready", "kept", "failed"} {
		mine[name] = r.checkpoint(name, func(c *vmckptv1.VMCheckpoint) {
			if strings.Contains(name, "kept") {
				c.Spec.DeletionPolicy = vmckptv1.DeletionRetain
			}
		})
		r.says(mine[name], vmckptv1.ReasonBound, "")
	}
	r.agent(mine["begun"], begun)
	r.agent(mine["begun-kept"], begun)
	r.agent(mine["ready"], captured)
	r.agent(mine["kept"], captured)
	r.agent(mine["failed"], func(c *vmckptv1.VMCheckpoint) { c.Failed("Unexpected", "it failed", time.Now()) })
	for _, c := range mine {
		r.must(r.Delete(t.Context(), c))
	}
	for _, name := range []string{"kept", "bound", "bound-kept"} { // no agent has anything to do
		r.gone(mine[name])
	}
	// What an agent may have made an image for is the agent's to end, and that is said.
	for name, does := range map[string]string{"begun": "removes the image", "ready": "removes the image", "failed": "removes the image", "begun-kept": "ends its work"} {
		c := mine[name]
		r.says(c, vmckptv1.ReasonDeleting, "the agent of node node-a "+does)
		if c.Status.Phase != vmckptv1.CheckpointDeleting || len(c.Finalizers) != 1 {
			t.Errorf("%+v", c)
		}
	}
	// What the agent says of it stands.
	r.agent(mine["ready"], func(c *vmckptv1.VMCheckpoint) {
		c.Waiting(vmckptv1.ReasonDeleting, "its image cannot be removed: the volume is full", time.Now())
	})
	time.Sleep(time.Second)
	r.says(mine["ready"], vmckptv1.ReasonDeleting, "its image cannot be removed")

	from := func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}
	}
	o := r.restore("unbegun", "", from)
	r.says(o, vmckptv1.ReasonBound, "")
	r.must(r.Delete(t.Context(), o))
	r.gone(o)
	o = r.restore("begun", "", from)
	r.says(o, vmckptv1.ReasonBound, "")
	o.Status.StartTime, o.Status.Attempts = &metav1.Time{Time: time.Now()}, 1
	o.Waiting(vmckptv1.ReasonRunning, "is being restored", time.Now())
	r.must(r.Status().Update(t.Context(), o))
	r.must(r.Delete(t.Context(), o))
	r.says(o, vmckptv1.ReasonDeleting, "the agent of node node-a ends the restore")
	if o.Status.Phase != vmckptv1.RestoreDeleting || len(o.Finalizers) != 1 {
		t.Errorf("%+v", o)
	}
}

// TestRestore waits for its checkpoint and for its turn.
func TestRestore(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.claim("claim", "")
	vmi := r.instance("vm", nil)
	first := r.restore("first", "one", nil)
	r.says(first, vmckptv1.ReasonWaiting, "there is no checkpoint one")
	c := r.checkpoint("one", nil)
	r.says(c, vmckptv1.ReasonBound, "") // which does not wait for the restore that waits for it
	r.says(first, vmckptv1.ReasonWaiting, "checkpoint one is not ready yet")
	r.agent(c, captured)
	r.says(first, vmckptv1.ReasonBound, "bound to node node-a")
	if s := first.Status; s.Image == nil || s.Image.Image != "one" || s.Image.ClaimName != "claim" || s.Digest != c.Status.Image.Digest || s.VMIUID != vmi.UID {
		t.Errorf("%+v", s)
	}
	second := r.restore("second", "", func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "claim", Image: "one"}
	})
	r.says(second, vmckptv1.ReasonRestoring, "restore first of the same virtual machine comes first")
	behind := r.checkpoint("behind", nil)
	r.says(behind, vmckptv1.ReasonRestoring, "comes first")
	r.must(r.Get(t.Context(), client.ObjectKeyFromObject(first), first))
	first.Succeeded(vmckptv1.ReasonRestored, "restored", time.Now())
	r.must(r.Status().Update(t.Context(), first))
	r.says(second, vmckptv1.ReasonBound, "")
	r.must(r.Delete(t.Context(), first))
	r.gone(first)
	r.must(r.Get(t.Context(), client.ObjectKeyFromObject(second), second))
	second.Failed("Unexpected", "it failed", time.Now())
	r.must(r.Status().Update(t.Context(), second))
	r.says(behind, vmckptv1.ReasonBound, "")

	// Into a machine that stands paused.
	fresh := r.restore("fresh", "one", func(o *vmckptv1.VMRestore) { o.Spec.Target.Mode = vmckptv1.RestorePaused })
	r.says(fresh, vmckptv1.ReasonWaitingForVM, "runs, and the restore is for one that stands paused")
	r.instance("vm", func(vmi *kubevirtv1.VirtualMachineInstance) {
		vmi.Status.Conditions = []kubevirtv1.VirtualMachineInstanceCondition{{Type: kubevirtv1.VirtualMachineInstancePaused, Status: corev1.ConditionTrue}}
	})
	r.says(fresh, vmckptv1.ReasonBound, "")

	failed := r.checkpoint("failed", func(c *vmckptv1.VMCheckpoint) { c.Spec.Source.Name = "other" })
	r.instance("other", nil)
	r.says(failed, vmckptv1.ReasonBound, "")
	r.agent(failed, func(c *vmckptv1.VMCheckpoint) { c.Failed("Unexpected", "it failed", time.Now()) })
	never := r.restore("never", "failed", func(o *vmckptv1.VMRestore) { o.Spec.Target.Name = "other" })
	r.says(never, "CheckpointFailed", "checkpoint failed has failed, and cannot be restored")
	unbound := r.restore("unbound", "nothing", nil)
	r.says(unbound, vmckptv1.ReasonWaiting, "")
	r.must(r.Delete(t.Context(), unbound))
	r.gone(unbound)
}

// TestLeaders take over from each other, and from an API server that was gone; another's write in between is no harm.
func TestLeaders(t *testing.T) {
	r := newRig(t)
	stop := r.controllers(true)
	r.claim("claim", "")
	first := r.checkpoint("first", nil)
	r.says(first, vmckptv1.ReasonWaitingForVM, "")
	r.controllers(true) // waits for the lease
	stop()
	r.instance("vm", nil)
	r.says(first, vmckptv1.ReasonBound, "")
	r.server.StopAPIServer(t)
	r.server.StartAPIServer(t)
	second := r.checkpoint("second", nil)
	var meddler sync.WaitGroup
	meddler.Go(func() { // labels, while it is bound
		for i := range 20 {
			o := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "second"}}
			if err := r.Patch(t.Context(), o, client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"metadata":{"labels":{"n":"%d"}}}`, i))); err != nil {
				t.Error(err)
			}
		}
	})
	r.says(second, vmckptv1.ReasonBound, "")
	meddler.Wait()
}

// TestThousand checkpoints at once, half of them of machines that are not there: a few writes each, and none when nothing changes.
func TestThousand(t *testing.T) {
	const many = 1000
	r := newRig(t)
	r.claim("claim", "")
	r.instance("vm", nil)
	var makers sync.WaitGroup
	for part := range 8 {
		makers.Go(func() {
			for i := part; i < many; i += 8 {
				r.checkpoint(fmt.Sprintf("c-%04d", i), func(c *vmckptv1.VMCheckpoint) {
					if i%2 == 1 {
						c.Spec.Source.Name = "missing"
					}
				})
			}
		})
	}
	makers.Wait()
	begin := time.Now()
	r.controllers(false)
	var list vmckptv1.VMCheckpointList
	for until := time.Now().Add(3 * bound); ; time.Sleep(100 * time.Millisecond) {
		r.must(r.List(t.Context(), &list, client.InNamespace(r.namespace)))
		bound, waiting := 0, 0
		for i := range list.Items {
			switch {
			case list.Items[i].Status.NodeName != "":
				bound++
			case len(list.Items[i].Status.Conditions) != 0:
				waiting++
			}
		}
		if bound == many/2 && waiting == many/2 {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("%d are bound, %d wait", bound, waiting)
		}
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("%v, %d writes, heap %d MiB", time.Since(begin), r.calls.Load(), memory.HeapInuse>>20)
	if n := r.calls.Load(); n > 3*many { // the finalizer, the status, and one more for conflicts
		t.Errorf("%d writes for %d checkpoints", n, many)
	}
	for until := time.Now().Add(bound); ; {
		before := r.calls.Load()
		time.Sleep(2 * time.Second)
		if r.calls.Load() == before {
			break
		}
		if time.Now().After(until) {
			t.Fatal("the controllers go on writing with nothing to do")
		}
	}
}
