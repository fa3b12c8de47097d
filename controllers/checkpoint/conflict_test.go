package checkpoint_test

import (
	"context"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/checkpoint"
	"github.com/vmckpt/vmckpt/controllers/restore"
)

// overtaken is a client before whose every write another has written.
type overtaken struct{ client.Client }

func (overtaken) Status() client.SubResourceWriter { return overtakenStatus{} }

type overtakenStatus struct{ client.SubResourceWriter }

func (overtakenStatus) Update(_ context.Context, o client.Object, _ ...client.SubResourceUpdateOption) error {
	return apierrors.NewConflict(schema.GroupResource{Group: vmckptv1.GroupVersion.Group}, o.GetName(), nil)
}

// TestConflict with another's write is no error, and the object is looked at again.
func TestConflict(t *testing.T) {
	r := newRig(t)
	c, o := r.checkpoint("first", nil), r.restore("back", "first", nil)
	stale := overtaken{r.Client}
	for object, reconciler := range map[client.Object]reconcile.Reconciler{
		c: &checkpoint.Reconciler{Client: stale, Live: r.Client, Events: events.NewFakeRecorder(1), Clock: clock.RealClock{}},
		o: &restore.Reconciler{Client: stale, Live: r.Client, Events: events.NewFakeRecorder(1), Clock: clock.RealClock{}},
	} {
		result, err := reconciler.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(object)})
		if err != nil || result.RequeueAfter <= 0 {
			t.Errorf("%s: %+v, %v", object.GetName(), result, err)
		}
	}
}
