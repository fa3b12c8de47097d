package apiserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/vmckpt/vmckpt/test/machine"
)

// Server is a kube-apiserver with an etcd of its own. Methods that take a testing.TB end the test if they fail.
type Server struct {
	programs Programs
	dir      string // everything that the server writes
	env      *envtest.Environment
	thread   thread // starts both programs
	down     bool   // the API server was stopped by StopAPIServer
}

// startTimeout is how long each of the two programs may take to be ready: 1 s for etcd and 5 s for the API server on two idle
// cores, and a multiple of it where QEMUs run beside them.
const startTimeout = 2 * time.Minute

// The files in Server.dir.
const (
	etcdData       = "etcd"
	etcdPID        = "etcd.pid"
	etcdLog        = "etcd.log"
	apiserverCerts = "certificates"
	apiserverPID   = "kube-apiserver.pid"
	apiserverLog   = "kube-apiserver.log"
	kubeconfig     = "kubeconfig"
)

// New starts a server for one test, which ends with it. A test that only needs a namespace of its own takes a [Shared] one.
func New(t testing.TB) *Server {
	t.Helper()
	s, err := Start(t.TempDir())
	if missing := (*machine.Unavailable)(nil); errors.As(err, &missing) {
		t.Skip(missing)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Start starts a server that writes into the directory alone; Stop ends it. Where something is missing for it the error is
// *machine.Unavailable.
func Start(dir string) (*Server, error) {
	programs, err := FindPrograms()
	if err != nil {
		return nil, err
	}
	s := &Server{programs: programs, dir: dir, thread: startThread()}
	if err := s.start(); err != nil {
		err = fmt.Errorf("start an API server: %w%s", err, s.lastLines())
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func (s *Server) start() error {
	for _, dir := range []string{etcdData, apiserverCerts} {
		if err := os.Mkdir(s.path(dir), 0o700); err != nil {
			return err
		}
	}
	etcd, apiserver := s.path("run-etcd"), s.path("run-kube-apiserver")
	if err := leash(etcd, s.programs.Etcd, s.path(etcdPID)); err != nil {
		return err
	}
	if err := leash(apiserver, s.programs.APIServer, s.path(apiserverPID)); err != nil {
		return err
	}
	etcdOut, err := os.OpenFile(s.path(etcdLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	apiserverOut, err := os.OpenFile(s.path(apiserverLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	etcdPort, err := freePort()
	if err != nil {
		return err
	}
	apiserverPort, err := freePort(etcdPort)
	if err != nil {
		return err
	}

	scheme, err := Scheme()
	if err != nil {
		return err
	}
	s.env = &envtest.Environment{
		Scheme:                   scheme,
		ControlPlaneStartTimeout: startTimeout,
		UseExistingCluster:       new(bool), // whatever the environment variable says
		ControlPlane: envtest.ControlPlane{
			Etcd: &envtest.Etcd{
				Path:    etcd,
				URL:     &url.URL{Scheme: "http", Host: net.JoinHostPort(loopback, etcdPort)},
				DataDir: s.path(etcdData),
				Out:     etcdOut, Err: etcdOut,
			},
			APIServer: &envtest.APIServer{
				Path:          apiserver,
				SecureServing: envtest.SecureServing{ListenAddr: envtest.ListenAddr{Address: loopback, Port: apiserverPort}},
				CertDir:       s.path(apiserverCerts),
				Out:           apiserverOut, Err: apiserverOut,
			},
			KubectlPath: s.programs.Kubectl,
		},
	}
	// Otherwise it looks for a default route to find an address that others reach it by, and there may be none.
	s.env.ControlPlane.APIServer.Configure().
		Set("advertise-address", loopback).
		Set("endpoint-reconciler-type", "none")
	if err := s.thread.do(func() error { _, err := s.env.Start(); return err }); err != nil {
		return err
	}
	return os.WriteFile(s.path(kubeconfig), s.env.KubeConfig, 0o600)
}

// Stop ends the server and removes what it wrote, once.
func (s *Server) Stop() error {
	err := errors.Join(kill(s.path(apiserverPID)), kill(s.path(etcdPID)))
	close(s.thread)
	if s.env != nil {
		for _, out := range []any{s.env.ControlPlane.Etcd.Out, s.env.ControlPlane.APIServer.Out} {
			err = errors.Join(err, out.(*os.File).Close())
		}
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// StopAPIServer kills the API server, as a crash of its node would: connections break, watches with them, and new ones are
// refused. etcd keeps its data. StartAPIServer brings it back, or the end of the test.
func (s *Server) StopAPIServer(t testing.TB) {
	t.Helper()
	if s.down {
		t.Fatal("the API server is stopped already")
	}
	if err := kill(s.path(apiserverPID)); err != nil {
		t.Fatalf("stop the API server: %v", err)
	}
	s.down = true
	t.Cleanup(func() {
		if s.down {
			s.StartAPIServer(t)
		}
	})
}

// StartAPIServer starts the API server again, at the same address and with the same certificates, and waits until it is
// ready: clients go on with the configuration that they have.
func (s *Server) StartAPIServer(t testing.TB) {
	t.Helper()
	if !s.down {
		t.Fatal("the API server is running")
	}
	if err := s.startAPIServer(); err != nil {
		t.Fatalf("start the API server again: %v%s", err, s.lastLines())
	}
	s.down = false
}

func (s *Server) startAPIServer() error {
	if err := s.thread.do(s.env.ControlPlane.APIServer.Start); err != nil {
		return err
	}
	// It says that it is healthy a moment before a new etcd has the default namespace.
	admin, err := client.New(s.env.Config, client.Options{Scheme: s.env.Scheme})
	if err != nil {
		return err
	}
	return wait.PollUntilContextTimeout(context.Background(), 50*time.Millisecond, startTimeout, true,
		func(ctx context.Context) (bool, error) {
			err := admin.Get(ctx, client.ObjectKey{Name: corev1.NamespaceDefault}, &corev1.Namespace{})
			return err == nil, nil
		})
}

// WipeEtcd loses everything that the API server knew, CustomResourceDefinitions and service accounts included, as when a
// cluster is set up anew: both programs are stopped, etcd's data is removed, and they are started again. Users keep their
// certificates; tokens of service accounts are worthless.
func (s *Server) WipeEtcd(t testing.TB) {
	t.Helper()
	if !s.down {
		s.StopAPIServer(t)
	}
	if err := s.wipe(); err != nil {
		t.Fatalf("wipe etcd: %v%s", err, s.lastLines())
	}
	s.StartAPIServer(t)
}

func (s *Server) wipe() error {
	if err := kill(s.path(etcdPID)); err != nil {
		return err
	}
	if err := os.RemoveAll(s.path(etcdData)); err != nil {
		return err
	}
	if err := os.Mkdir(s.path(etcdData), 0o700); err != nil {
		return err
	}
	return s.thread.do(s.env.ControlPlane.Etcd.Start)
}

// Config returns the configuration of a client that may do everything.
func (s *Server) Config() *rest.Config { return rest.CopyConfig(s.env.Config) }

// Client returns a client that may do everything and knows the types of [Scheme].
func (s *Server) Client(t testing.TB) client.Client {
	t.Helper()
	return s.ClientOf(t, s.Config())
}

// ClientOf returns a client with somebody else's configuration that knows the types of [Scheme].
func (s *Server) ClientOf(t testing.TB, config *rest.Config) client.Client {
	t.Helper()
	c, err := client.New(config, client.Options{Scheme: s.env.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Namespace makes a namespace for the test and returns its name.
func (s *Server) Namespace(t testing.TB) string {
	t.Helper()
	ns := &corev1.Namespace{}
	ns.GenerateName = "test-"
	ns.Annotations = map[string]string{"test": t.Name()}
	if err := s.Client(t).Create(t.Context(), ns); err != nil {
		t.Fatalf("make a namespace: %v", err)
	}
	return ns.Name
}

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

// lastLines returns the end of both logs, for an error.
func (s *Server) lastLines() string {
	const lines = 15
	var b strings.Builder
	for _, name := range []string{etcdLog, apiserverLog} {
		text, err := os.ReadFile(s.path(name))
		if err != nil {
			continue
		}
		all := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(&b, "\n--- the end of %s:\n%s", name, strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return b.String()
}

const loopback = "127.0.0.1"

// freePort returns a port of the loopback address that nobody listens at, other than those given. It is none that the kernel
// gives to outgoing connections: these begin at 32768 (ip_local_port_range), and while the API server is stopped one could
// take its port, even the connection of a client that tries to reach it.
func freePort(not ...string) (string, error) {
	const first, end = 10000, 32768
	for range 1000 {
		port := strconv.Itoa(first + rand.IntN(end-first))
		if len(not) > 0 && port == not[0] {
			continue
		}
		if l, err := net.Listen("tcp", net.JoinHostPort(loopback, port)); err == nil {
			return port, l.Close()
		}
	}
	return "", errors.New("no free port")
}
