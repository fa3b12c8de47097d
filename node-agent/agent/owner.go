package agent

import (
	"fmt"
	"strings"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// A directory may be the volume of several namespaces' claims. An image holds a machine's memory, and so all its secrets: it belongs to the
// machine's namespace, and objects of others do not get at it.

// reasonOtherNamespace is the reason of a condition.
const reasonOtherNamespace = "OtherNamespace"

// namespaceOf is the namespace of the machine that an image is of: as the agent wrote it, or by KubeVirt's name for the machine. It is empty where
// the image does not say.
func namespaceOf(image *jobs.ImageResult) string {
	if namespace := image.Attributes[attributeNamespace]; namespace != "" {
		return namespace
	}
	namespace, _, ofKubeVirt := strings.Cut(image.Attributes[capture.AttributeGuest], "_")
	if !ofKubeVirt {
		return ""
	}
	return namespace
}

// checkOwner refuses an image to an object of another namespace.
func (a *Agent) checkOwner(namespace string, image *jobs.ImageResult) error {
	owner := namespaceOf(image)
	if a.o.OtherNamespaces || owner == namespace {
		return nil
	}
	whose := fmt.Sprintf("is of a machine of namespace %q", owner)
	if owner == "" {
		whose = "does not say which namespace its machine was of"
	}
	return &unfitError{reasonOtherNamespace, fmt.Sprintf("image %s %s, and cannot be had from namespace %q (the node agents' --allow-other-namespaces permits it)", image.Name, whose, namespace)}
}
