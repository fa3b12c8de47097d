package main

import (
	"context"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"

	"github.com/vmckpt/vmckpt/cmd/internal/settings"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	os.Exit(shared.Main(m))
}

// TestReady is only who has read every kind, and says in plain words which product is missing.
func TestReady(t *testing.T) {
	server := shared.Server(t)
	scheme, err := settings.Scheme()
	if err != nil {
		t.Fatal(err)
	}
	c, err := cache.New(server.Config(), cache.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		if err := c.Start(ctx); err != nil {
			t.Error(err)
		}
	}()
	check := synced(c, logr.Discard())
	says := func(want string) {
		t.Helper()
		for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			q, err := http.NewRequestWithContext(ctx, http.MethodGet, "/readyz", nil)
			if err != nil {
				t.Fatal(err)
			}
			got := check(q)
			if got == nil && want == "" || got != nil && want != "" && strings.HasPrefix(got.Error(), want) {
				return
			}
			if time.Now().After(until) {
				t.Fatalf("says %v, want %q", got, want)
			}
		}
	}
	says("VMckpt's CustomResourceDefinitions are not installed: the API server has no kind VMCheckpoint")
	server.InstallCRDs(t, "../../config/crd/bases")
	says("KubeVirt is not installed: the API server has no kind VirtualMachine")
	server.InstallKubeVirt(t)
	says("")
}
