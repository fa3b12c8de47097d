package checkpoint_test

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// TestClaimWithoutVolume says what it waits for, as far as the storage class tells.
func TestClaimWithoutVolume(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.patience = 20 * time.Second // less than a look once a minute would take
	r.instance("vm", nil)
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: r.namespace}, Provisioner: "vmckpt.io/none"}
	pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "claim"}}
	pvc.Spec = r.unboundClaim("template").Spec
	pvc.Spec.StorageClassName, pvc.Spec.VolumeName = &class.Name, ""
	r.must(r.Create(t.Context(), pvc))
	c := r.checkpoint("first", nil)
	o := r.restore("back", "", func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume, o.Spec.Target.Name = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}, "other"
	})
	r.instance("other", nil)
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonClaim, "there is no storage class "+class.Name)
	}
	first := storagev1.VolumeBindingWaitForFirstConsumer
	class.VolumeBindingMode = &first
	r.must(r.Create(t.Context(), class))
	r.Cleanup(func() { r.must(r.Delete(context.Background(), class)) })
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonClaim, "makes one when the first pod uses the claim (WaitForFirstConsumer). Start a pod that mounts it")
	}
}

// TestWokenAtOnce by the volume and by the labels of nodes.
func TestWokenAtOnce(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.patience = 20 * time.Second // less than a look once a minute would take
	n := r.node("a")
	for _, name := range []string{"vm", "other"} {
		r.instance(name, func(vmi *kubevirtv1.VirtualMachineInstance) { vmi.Status.NodeName = n.Name })
	}
	label := r.namespace + "-rack"
	pvc := r.unboundClaim("claim")
	r.bindClaim(pvc)
	c := r.checkpoint("first", nil)
	o := r.restore("back", "", func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume, o.Spec.Target.Name = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}, "other"
	})
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonClaim, "has a volume that is gone")
	}
	another := pvc.DeepCopy()
	another.UID = "another"
	pv := r.volume(another, label)
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonClaim, "has a volume that belongs to another claim")
	}
	pv.Spec.ClaimRef.UID = pvc.UID
	r.must(r.Update(t.Context(), pv))
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonClaim, "cannot be reached from node "+n.Name)
	}
	n.Labels["kubernetes.io/hostname"] = label
	r.must(r.Update(t.Context(), n))
	for _, waits := range []client.Object{c, o} {
		r.says(waits, vmckptv1.ReasonBound, "bound to node "+n.Name)
	}
}

// TestTornMemory is not captured until a restore has made it whole.
func TestTornMemory(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	r.claim("claim", "")
	r.instance("vm", nil)
	from := func(o *vmckptv1.VMRestore) {
		o.Spec.Source.Volume = &vmckptv1.ImageRef{ClaimName: "claim", Image: "old"}
	}
	torn := r.restore("torn", "", from)
	r.says(torn, vmckptv1.ReasonBound, "")
	ago := time.Now().Add(-time.Minute)
	torn.SetMemoryInvalid(true, "half overwritten", ago)
	torn.Failed("Unexpected", "it failed", ago)
	r.must(r.Status().Update(t.Context(), torn))
	c := r.checkpoint("first", nil)
	r.says(c, vmckptv1.ReasonMemoryInvalid, "restore torn left the memory of virtual machine vm half overwritten")
	whole := r.restore("whole", "", from)
	r.says(whole, vmckptv1.ReasonBound, "")
	r.says(c, vmckptv1.ReasonRestoring, "restore whole")
	whole.Succeeded(vmckptv1.ReasonRestored, "restored", time.Now())
	r.must(r.Status().Update(t.Context(), whole))
	r.says(c, vmckptv1.ReasonBound, "")
}

// TestVolumeKinds that no node agent reaches are refused before anything is bound or held.
func TestVolumeKinds(t *testing.T) {
	r := newRig(t)
	r.controllers(false)
	for name, source := range map[string]corev1.PersistentVolumeSource{
		"csi": {CSI: &corev1.CSIPersistentVolumeSource{Driver: "disks.example.com", VolumeHandle: "1"}},
		"nfs": {NFS: &corev1.NFSVolumeSource{Server: "files.example.com", Path: "/"}},
	} {
		pvc := r.unboundClaim(name)
		pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: pvc.Spec.VolumeName}}
		pv.Spec.AccessModes, pv.Spec.Capacity, pv.Spec.PersistentVolumeSource = pvc.Spec.AccessModes, pvc.Spec.Resources.Requests, source
		pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: r.namespace, Name: pvc.Name, UID: pvc.UID}
		r.must(r.Create(t.Context(), pv))
		r.bindClaim(pvc)
		r.instance(name, nil)
		c := r.checkpoint(name, func(c *vmckptv1.VMCheckpoint) { c.Spec.Source.Name, c.Spec.Storage.ClaimName = name, name })
		imported := r.checkpoint(name+"-import", func(c *vmckptv1.VMCheckpoint) {
			c.Spec.Import, c.Spec.Storage.ClaimName = &vmckptv1.Import{Image: "old"}, name
		})
		o := r.restore(name, "", func(o *vmckptv1.VMRestore) {
			o.Spec.Source.Volume, o.Spec.Target.Name = &vmckptv1.ImageRef{ClaimName: name, Image: "old"}, name
		})
		for _, refused := range []client.Object{c, imported, o} {
			r.says(refused, vmckptv1.ReasonClaim, "images can be only on volumes of the kinds local and hostPath")
			if len(refused.GetFinalizers()) != 0 {
				t.Errorf("%v", refused.GetFinalizers())
			}
		}
		if !c.Done() || !imported.Done() || !o.Done() || c.Status.NodeName+imported.Status.NodeName+o.Status.NodeName != "" {
			t.Errorf("%+v, %+v, %+v", c.Status, imported.Status, o.Status)
		}
	}
}
