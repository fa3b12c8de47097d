package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/image"
)

// TestNotMounted: a volume goes, and what lay beneath it is seen, empty or with a repository of its own. Nothing is written there, nothing counts as
// gone, and all goes on when the volume is back, past every timeout.
func TestNotMounted(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	away := filepath.Join(t.TempDir(), "away")
	m, vmi := r.machine("vm", false)
	r.agent(node, nil)
	first, second := r.checkpoint("first", vmi, nil), r.checkpoint("second", vmi, nil)
	r.ready(first, vmckptv1.ReasonCaptured)
	r.ready(second, vmckptv1.ReasonCaptured)
	short := metav1.Duration{Duration: 2 * time.Second}

	for _, under := range []string{"nothing", "another repository"} {
		r.must(os.Rename(volume, away))
		r.must(os.Mkdir(volume, 0o700))
		if under == "another repository" {
			r.must(image.InitRepositoryOn(volume, "vmckpt"))
		}
		name := strings.ReplaceAll(under, " ", "-")
		later := r.checkpoint("later-"+name, vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.Timeout = short })
		imported := r.checkpoint("imported-"+name, nil, func(c *vmckptv1.VMCheckpoint) {
			c.Spec.Import, c.Spec.Timeout, c.Spec.DeletionPolicy = &vmckptv1.Import{Image: "second"}, short, vmckptv1.DeletionRetain
		})
		back := r.restore("back-"+name, "second", vmi, func(o *vmckptv1.VMRestore) {
			inPlace(o)
			o.Spec.Timeout = short
		})
		victim := map[string]*vmckptv1.VMCheckpoint{"nothing": first, "another repository": later}[under]
		if under == "nothing" {
			r.must(r.Delete(t.Context(), first))
		}
		began := time.Now()
		waits := func(what string, conditions []metav1.Condition) bool {
			return strings.Contains(message(conditions), "mounted?") && time.Since(began) > 3*time.Second
		}
		for _, c := range []*vmckptv1.VMCheckpoint{later, imported, victim} {
			wait(r, c, c.Name+" to wait for the volume", func(c *vmckptv1.VMCheckpoint) bool { return waits(c.Name, c.Status.Conditions) })
			if c.Done() && c.DeletionTimestamp == nil {
				t.Errorf("over %s, %s: %s", under, c.Name, message(c.Status.Conditions))
			}
		}
		wait(r, back, "the restore to wait for the volume", func(o *vmckptv1.VMRestore) bool { return waits(o.Name, o.Status.Conditions) })
		if back.Done() {
			t.Errorf("over %s, the restore: %s", under, message(back.Status.Conditions))
		}
		if entries, err := os.ReadDir(filepath.Join(volume, "vmckpt", "images")); err == nil && len(entries) != 0 || under == "nothing" && err == nil {
			t.Errorf("over %s, something was written: %v", under, entries)
		}
		r.must(os.RemoveAll(volume))
		r.must(os.Rename(away, volume))
		r.ready(later, vmckptv1.ReasonCaptured)
		r.ready(imported, vmckptv1.ReasonAdopted)
		wait(r, back, "the restore", (*vmckptv1.VMRestore).Done)
		if !back.Ready() {
			t.Error(message(back.Status.Conditions))
		}
		if under == "nothing" {
			r.gone(first)
		}
	}
	if got := images(t, volume); !slices.Equal(got, []string{"later-another-repository", "later-nothing", "second"}) {
		t.Errorf("images: %v", got)
	}
	goesOn(t, m)

	// One that is not known of by any object: it is made, as on every new volume.
	var all vmckptv1.VMCheckpointList
	r.must(r.List(t.Context(), &all, client.InNamespace(r.namespace)))
	for i := range all.Items {
		r.must(r.Delete(t.Context(), &all.Items[i]))
		r.gone(&all.Items[i])
	}
	// But not where the volume's own directory is missing, as one is on a file system that is not mounted.
	r.must(os.RemoveAll(volume))
	made := r.checkpoint("new", vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.Timeout = short })
	wait(r, made, "the volume to be missed for longer than its time", func(c *vmckptv1.VMCheckpoint) bool {
		return strings.Contains(message(c.Status.Conditions), "mounted?") && time.Since(c.CreationTimestamp.Time) > 4*time.Second
	})
	r.must(os.Mkdir(volume, 0o700))
	r.ready(made, vmckptv1.ReasonCaptured)
}
