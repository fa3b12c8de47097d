package agent_test

import (
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/agent"
)

// refuse has the API server refuse, for good, that checkpoints of that name become ready, until it is told to take them.
func (r *rig) refuse(name string) (take func()) {
	r.Helper()
	tooLarge := metav1.StatusReasonRequestEntityTooLarge
	policy := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: r.namespace}}
	policy.Spec = admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
			Operations: []admissionv1.OperationType{admissionv1.Update},
			Rule:       admissionv1.Rule{APIGroups: []string{"vmckpt.io"}, APIVersions: []string{"*"}, Resources: []string{"vmcheckpoints/status"}},
		}}}},
		Validations: []admissionv1.Validation{{
			Expression: `!(object.metadata.name in ["probe", "` + name + `"] && object.status.phase == "Ready")`, Message: "not this one", Reason: &tooLarge,
		}},
	}
	r.must(r.Create(r.Context(), policy))
	binding := &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: r.namespace}}
	binding.Spec = admissionv1.ValidatingAdmissionPolicyBindingSpec{PolicyName: policy.Name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny}}
	r.must(r.Create(r.Context(), binding))

	probe := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "probe"}}
	probe.Spec.Source.Name, probe.Spec.Storage.ClaimName = "vm", "claim"
	r.must(r.Create(r.Context(), probe))
	for until := time.Now().Add(bound); ; time.Sleep(50 * time.Millisecond) {
		probe.Succeeded(vmckptv1.ReasonCaptured, "a probe", time.Now())
		err := r.Status().Update(r.Context(), probe)
		if apierrors.IsRequestEntityTooLargeError(err) {
			break
		}
		if err != nil && !apierrors.IsConflict(err) || time.Now().After(until) {
			r.Fatalf("the policy does not hold: %v", err)
		}
		r.must(r.Get(r.Context(), client.ObjectKeyFromObject(probe), probe))
	}
	return func() { r.must(r.Delete(r.Context(), binding)) }
}

// TestStatusRefused: the API server does not take the end of a checkpoint, for good. Others are worked on, and when it takes it the image is the one
// that was captured then.
func TestStatusRefused(t *testing.T) {
	r := newRig(t)
	volume := r.claim("claim")
	_, vmi := r.machine("vm", false)
	take := r.refuse("refused")
	g, metrics := &gate{}, agent.NewMetrics()
	r.agent(node, func(o *agent.Options) { o.Engine, o.Slots, o.Metrics = g, 1, metrics })
	refused := r.checkpoint("refused", vmi, func(c *vmckptv1.VMCheckpoint) { c.Spec.Timeout = metav1.Duration{Duration: 3 * time.Second} })
	r.told(refused, "not this one")
	r.ready(r.checkpoint("next", vmi, nil), vmckptv1.ReasonCaptured)
	wait(r, refused, "more than its time", func(c *vmckptv1.VMCheckpoint) bool {
		return c.Done() || c.Status.StartTime != nil && time.Since(c.Status.StartTime.Time) > 6*time.Second
	})
	take()
	r.ready(refused, vmckptv1.ReasonCaptured)
	if got := g.captured(); !slices.Equal(got, []string{"refused", "next"}) {
		t.Errorf("captured: %v", got)
	}
	if got := images(t, volume); !slices.Equal(got, []string{"next", "refused"}) {
		t.Errorf("images: %v", got)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics.Collectors()...)
	families, err := registry.Gather()
	r.must(err)
	for _, f := range families {
		if f.GetName() == "vmckpt_status_refused_total" && f.Metric[0].GetCounter().GetValue() > 0 {
			return
		}
	}
	t.Error("no metric counts what was refused")
}
