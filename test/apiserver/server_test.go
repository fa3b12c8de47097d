package apiserver_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

// settings makes a ConfigMap in the namespace.
func settings(t *testing.T, c client.Client, namespace string) *corev1.ConfigMap {
	t.Helper()
	cm := &corev1.ConfigMap{Data: map[string]string{"colour": "green"}}
	cm.Namespace, cm.Name = namespace, "settings"
	if err := c.Create(t.Context(), cm); err != nil {
		t.Fatal(err)
	}
	return cm
}

func TestProgramsSayTheirTrueVersion(t *testing.T) {
	server := shared.Server(t)
	if os.Getenv("KUBEBUILDER_ASSETS") != "" {
		t.Skip("the programs are not those of hack/setup")
	}
	clients, err := kubernetes.NewForConfig(server.Config())
	if err != nil {
		t.Fatal(err)
	}
	version, err := clients.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	if version.Major != "1" || version.Minor == "" || !strings.HasPrefix(version.GitVersion, "v1."+version.Minor+".") {
		t.Errorf("the server's version is %v (major %q, minor %q)", version, version.Major, version.Minor)
	}
	out := server.Kubectl(t, "version")
	for _, line := range []string{"Client Version: " + version.GitVersion, "Server Version: " + version.GitVersion} {
		if !strings.Contains(out, line+"\n") {
			t.Errorf("kubectl version has no line %q:\n%s", line, out)
		}
	}
}

func TestAConfigMapOutlivesTheAPIServer(t *testing.T) {
	server := shared.Server(t)
	admin := server.Client(t)
	want := settings(t, admin, server.Namespace(t))
	events, err := client.NewWithWatch(server.Config(), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	watch, err := events.Watch(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(want.Namespace))
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()

	start := time.Now()
	server.StopAPIServer(t)
	t.Logf("stopped in %v", time.Since(start))
	got := &corev1.ConfigMap{}
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(want), got); err == nil || apierrors.IsNotFound(err) {
		t.Errorf("while the API server is gone, reading says %v, want a broken connection", err)
	}
	for range watch.ResultChan() { // until the watch breaks
	}
	start = time.Now()
	server.StartAPIServer(t)
	t.Logf("started in %v", time.Since(start))

	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(want), got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the ConfigMap changed (-before +after):\n%s", diff)
	}
	if _, err := events.Watch(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(want.Namespace)); err != nil {
		t.Errorf("watching again: %v", err)
	}
}

func TestRBACDecides(t *testing.T) {
	server := shared.Server(t)
	admin := server.Client(t)
	namespace, other := server.Namespace(t), server.Namespace(t)
	account := server.ServiceAccount(t, namespace, "operator")

	for name, who := range map[string]struct {
		config  *rest.Config
		subject rbacv1.Subject
	}{
		"user": {
			server.User(t, "jane"),
			rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "jane"},
		},
		"group": {
			server.User(t, "joe", "storage"),
			rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: "storage"},
		},
		"service account": {
			account,
			rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: "operator"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := server.ClientOf(t, who.config)
			if err := c.List(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(namespace)); !apierrors.IsForbidden(err) {
				t.Fatalf("without a role, listing says %v, want forbidden", err)
			}
			role := &rbacv1.Role{Rules: []rbacv1.PolicyRule{{
				APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"list"},
			}}}
			role.Namespace, role.GenerateName = namespace, "reader-"
			if err := admin.Create(t.Context(), role); err != nil {
				t.Fatal(err)
			}
			binding := &rbacv1.RoleBinding{
				RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
				Subjects: []rbacv1.Subject{who.subject},
			}
			binding.Namespace, binding.GenerateName = namespace, "reader-"
			if err := admin.Create(t.Context(), binding); err != nil {
				t.Fatal(err)
			}
			// The authorizer learns of it by a watch.
			eventually(t, func() error {
				return c.List(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(namespace))
			})
			if err := c.List(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(other)); !apierrors.IsForbidden(err) {
				t.Errorf("in another namespace, listing says %v, want forbidden", err)
			}
			if err := c.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: role.ObjectMeta}); !apierrors.IsForbidden(err) {
				t.Errorf("with the right to list, creating says %v, want forbidden", err)
			}
		})
	}
}

func TestWipingEtcdLosesEverything(t *testing.T) {
	server := apiserver.New(t)
	admin := server.Client(t)
	server.InstallKubeVirt(t)
	namespace := server.Namespace(t)
	account := server.ServiceAccount(t, namespace, "operator")
	lost := settings(t, admin, namespace)

	start := time.Now()
	server.WipeEtcd(t)
	t.Logf("wiped in %v", time.Since(start))

	virtualMachines := &kubevirtv1.VirtualMachineList{}
	admin = server.Client(t) // the old one remembers which kinds there were
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(lost), lost); !apierrors.IsNotFound(err) {
		t.Errorf("reading what was lost says %v, want not found", err)
	}
	if err := admin.Get(t.Context(), client.ObjectKey{Name: namespace}, &corev1.Namespace{}); !apierrors.IsNotFound(err) {
		t.Errorf("reading the namespace says %v, want not found", err)
	}
	if err := admin.List(t.Context(), virtualMachines); !meta.IsNoMatchError(err) {
		t.Errorf("listing VirtualMachines says %v, want that there is no such kind", err)
	}
	c := server.ClientOf(t, account)
	if err := c.List(t.Context(), &corev1.ConfigMapList{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("with a token of an account that was lost, listing says %v, want unauthorized", err)
	}

	// It can be filled again.
	server.InstallKubeVirt(t)
	if err := admin.List(t.Context(), virtualMachines); err != nil {
		t.Error(err)
	}
	settings(t, admin, server.Namespace(t))
}

// eventually waits until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still after 10 s: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
