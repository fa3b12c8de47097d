package agent_test

import (
	"slices"
	"strings"
	"testing"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
)

// TestOtherNamespace: a directory is the volume of claims of two namespaces. The images of one are not to be had by the other, unless the agent is
// told so, and never deleted by it where it is not.
func TestOtherNamespace(t *testing.T) {
	theirs, ours := newRig(t), newRig(t)
	volume := theirs.claim("claim")
	ours.claimOf("claim", volume)
	_, vmi := theirs.machine("vm", false)
	theirs.agent(node, nil)
	theirs.ready(theirs.checkpoint("secret", vmi, nil), vmckptv1.ReasonCaptured)
	other := func(o *agent.Options) { o.NodeName = "node-b" }
	m, mine := ours.machine("vm", false)
	ours.onNode(mine, "node-b")
	stop := ours.agent("node-b", other)

	imports := func(name string) *vmckptv1.VMCheckpoint {
		return ours.checkpointOn("node-b", name, nil, func(c *vmckptv1.VMCheckpoint) { c.Spec.Import = &vmckptv1.Import{Image: "secret"} })
	}
	imported := imports("imported")
	wait(ours, imported, "the refusal", done)
	if got := message(imported.Status.Conditions); imported.Ready() || !strings.HasPrefix(got, "OtherNamespace: ") {
		t.Errorf("imported: %s", got)
	}
	restored := ours.unbound("restored", "secret", mine, inPlace)
	ours.bindOn("node-b", restored, mine)
	wait(ours, restored, "the refusal", (*vmckptv1.VMRestore).Done)
	if got := message(restored.Status.Conditions); restored.Ready() || !strings.HasPrefix(got, "OtherNamespace: ") {
		t.Errorf("restored: %s", got)
	}
	goesOn(t, m)
	stop()

	// Permitted, and forbidden again.
	stop = ours.agent("node-b", func(o *agent.Options) {
		other(o)
		o.OtherNamespaces = true
	})
	moved := imports("moved")
	ours.ready(moved, vmckptv1.ReasonAdopted)
	stop()
	ours.agent("node-b", other)
	ours.must(ours.Delete(t.Context(), moved))
	ours.gone(moved)
	ours.told(moved, "image secret stays")
	if got := images(t, volume); !slices.Equal(got, []string{"secret"}) {
		t.Errorf("images: %v", got)
	}

	// Their own is theirs.
	again := theirs.restore("again", "secret", vmi, inPlace)
	wait(theirs, again, "the restore", (*vmckptv1.VMRestore).Done)
	if !again.Ready() {
		t.Error(message(again.Status.Conditions))
	}
}
