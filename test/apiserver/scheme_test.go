package apiserver_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"
	_ "sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/vmckpt/vmckpt/test/apiserver"
)

func TestSchemeKnowsAllTypes(t *testing.T) {
	scheme, err := apiserver.Scheme()
	if err != nil {
		t.Fatal(err)
	}
	for kind, object := range map[string]runtime.Object{
		"Pod":                    &corev1.Pod{},
		"VirtualMachine":         &kubevirtv1.VirtualMachine{},
		"VirtualMachineInstance": &kubevirtv1.VirtualMachineInstance{},
	} {
		gvk, err := apiutil.GVKForObject(object, scheme)
		if err != nil {
			t.Errorf("%T: %v", object, err)
		} else if gvk.Kind != kind {
			t.Errorf("%T is of kind %q, want %q", object, gvk.Kind, kind)
		}
	}
}
