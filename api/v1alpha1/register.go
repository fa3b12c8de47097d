package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is that of the types here.
var GroupVersion = schema.GroupVersion{Group: "vmckpt.io", Version: "v1alpha1"}

// AddToScheme makes the types known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &VMCheckpoint{}, &VMCheckpointList{}, &VMRestore{}, &VMRestoreList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
