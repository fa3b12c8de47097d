package apiserver

import (
	"embed"
	"fmt"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"
)

// crdTimeout is how long the API server may take to serve what a CustomResourceDefinition defines.
const crdTimeout = time.Minute

// InstallCRDs installs the CustomResourceDefinitions in the directories' YAML files, or brings them up to date, and waits
// until they are served.
func (s *Server) InstallCRDs(t testing.TB, directories ...string) {
	t.Helper()
	s.installCRDs(t, envtest.CRDInstallOptions{Paths: directories, ErrorIfPathMissing: true})
}

// InstallKubeVirt installs KubeVirt's CustomResourceDefinitions: VirtualMachine, VirtualMachineInstance and
// VirtualMachineInstanceMigration. They are cut down to what their comments say.
func (s *Server) InstallKubeVirt(t testing.TB) {
	t.Helper()
	crds, err := kubeVirtCRDs()
	if err != nil {
		t.Fatal(err)
	}
	s.installCRDs(t, envtest.CRDInstallOptions{CRDs: crds})
}

func (s *Server) installCRDs(t testing.TB, options envtest.CRDInstallOptions) {
	t.Helper()
	options.Scheme, options.MaxTime = s.env.Scheme, crdTimeout
	if _, err := envtest.InstallCRDs(s.Config(), options); err != nil {
		t.Fatalf("install CustomResourceDefinitions: %v", err)
	}
}

//go:embed kubevirt/*.yaml
var kubeVirtFiles embed.FS

func kubeVirtCRDs() ([]*apiextensionsv1.CustomResourceDefinition, error) {
	const dir = "kubevirt"
	entries, err := kubeVirtFiles.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var crds []*apiextensionsv1.CustomResourceDefinition
	for _, entry := range entries {
		text, err := kubeVirtFiles.ReadFile(dir + "/" + entry.Name())
		if err != nil {
			return nil, err
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(text, crd); err != nil {
			return nil, fmt.Errorf("%s: %w", entry.Name(), err)
		}
		crds = append(crds, crd)
	}
	return crds, nil
}
