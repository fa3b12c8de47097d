package apiserver

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// User returns the configuration of a client that is the user, by a client certificate. RBAC decides what it may: nothing
// but what every authenticated user may, unless it is given more.
func (s *Server) User(t testing.TB, name string, groups ...string) *rest.Config {
	t.Helper()
	user, err := s.env.AddUser(envtest.User{Name: name, Groups: groups}, s.base())
	if err != nil {
		t.Fatalf("make user %s: %v", name, err)
	}
	return user.Config()
}

// ServiceAccount returns the configuration of a client that is the service account, by a token as its pods have one. The
// service account is made if it does not exist.
func (s *Server) ServiceAccount(t testing.TB, namespace, name string) *rest.Config {
	t.Helper()
	admin := s.Client(t)
	account := &corev1.ServiceAccount{}
	account.Namespace, account.Name = namespace, name
	if err := admin.Create(t.Context(), account); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("make service account %s/%s: %v", namespace, name, err)
	}
	token := &authenticationv1.TokenRequest{}
	if err := admin.SubResource("token").Create(t.Context(), account, token); err != nil {
		t.Fatalf("get a token of service account %s/%s: %v", namespace, name, err)
	}
	config := s.base()
	config.Host = s.env.Config.Host
	config.CAData = s.env.Config.CAData
	config.BearerToken = token.Status.Token
	return config
}

// base is what all configurations have in common: requests are not held back.
func (s *Server) base() *rest.Config {
	return &rest.Config{QPS: s.env.Config.QPS, Burst: s.env.Config.Burst}
}

// Kubeconfig returns the path of a kubeconfig file of the administrator's.
func (s *Server) Kubeconfig() string { return s.path(kubeconfig) }

// Kubectl runs kubectl as the administrator and returns what it prints.
func (s *Server) Kubectl(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.programs.Kubectl, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig(), "HOME="+s.dir)
	out, err := cmd.Output()
	if err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatalf("kubectl %q: %v", args, err)
	}
	return string(out)
}

// KubectlPath returns where kubectl is.
func (s *Server) KubectlPath() string { return s.programs.Kubectl }
