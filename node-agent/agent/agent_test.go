package agent_test

import (
	"slices"
	"testing"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/test/guest/writer"
)

// TestCheckpointsAndRestore is the main way: a base and an increment of a machine at work, the machine killed, another restored.
func TestCheckpointsAndRestore(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	m, vmi := r.machine("vm", false)
	r.agent(node, nil)

	base := r.checkpoint("base", vmi, nil)
	wait(r, base, "the base", done)
	if !base.Ready() || base.Status.Phase != vmckptv1.CheckpointReady || base.Status.Image.Kind != vmckptv1.ImageBase ||
		base.Status.ObservedGeneration != base.Generation || base.Status.Downtime.Duration <= 0 || base.Status.Memory.StoredPages == 0 {
		t.Fatalf("base: %s: %+v", message(base.Status.Conditions), base.Status)
	}
	if p := base.Status.Memory; p.TotalPages != p.UnpopulatedPages+p.UniformPages+p.EvictedPages+p.StoredPages {
		t.Errorf("the breakdown does not add up: %+v", p)
	}
	increment := r.checkpoint("increment", vmi, nil)
	wait(r, increment, "the increment", done)
	if !increment.Ready() || increment.Status.Image.Parent != "base" || increment.Status.DirtySource == "" {
		t.Fatalf("increment: %s: %+v", message(increment.Status.Conditions), increment.Status)
	}
	early := r.checkpoint("early", vmi, func(o *vmckptv1.VMCheckpoint) { o.Spec.Instant, o.Spec.Mode = vmckptv1.InstantEarly, vmckptv1.ModeFull })
	wait(r, early, "the one with an early instant", done)
	if !early.Ready() || early.Status.Guard == nil || early.Status.Guard.GuardedPages == 0 || early.Status.Guard.CaughtPages > early.Status.Guard.GuardedPages {
		t.Fatalf("early: %s: %+v", message(early.Status.Conditions), early.Status)
	}
	at, _, err := m.WriterStatus(t.Context())
	r.must(err)
	r.must(m.Kill())

	second, _ := r.machine("vm", true)
	restored := r.restore("back", "early", vmi, nil)
	wait(r, restored, "the restore", (*vmckptv1.VMRestore).Done)
	if !restored.Ready() || restored.Status.Phase != vmckptv1.RestoreRestored || restored.Status.Duration == nil {
		t.Fatalf("restore: %s: %+v", message(restored.Status.Conditions), restored.Status)
	}
	now, err := second.WaitWriter(t.Context(), func(s writer.Status) bool { return s.Passes > at.Passes })
	if err != nil || now.Errors != 0 {
		t.Errorf("the guest went on from %+v to %+v: %v", at, now, err)
	}

	// Deleting: Retain leaves the image, Delete takes it, and the increment is whole without its parent.
	r.must(r.Delete(t.Context(), base))
	r.gone(base)
	if got := images(t, volume); !slices.Equal(got, []string{"early", "increment"}) {
		t.Errorf("images after the base was deleted: %v", got)
	}
	again := r.restore("again", "increment", vmi, func(o *vmckptv1.VMRestore) { o.Spec.Target.Mode = vmckptv1.RestoreInPlace })
	wait(r, again, "the restore in place", (*vmckptv1.VMRestore).Done)
	if !again.Ready() {
		t.Errorf("restore in place: %s", message(again.Status.Conditions))
	}
}
