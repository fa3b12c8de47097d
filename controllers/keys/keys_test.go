package keys_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/keys"
	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

var shared apiserver.Shared

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	os.Exit(shared.Main(m))
}

// TestKeys are made where there are none, never changed, and not made anew where images were written with what is lost.
func TestKeys(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	maker := &keys.Maker{Client: admin, Clock: clock.RealClock{}, Namespace: namespace, Name: "keys"}
	made := func() *corev1.Secret {
		t.Helper()
		if err := maker.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		s := &corev1.Secret{}
		err := admin.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "keys"}, s)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := made()
	current := string(first.Data["current"])
	if _, err := image.ParseKeys(first.Data[current]); err != nil {
		t.Errorf("entry %q: %v", current, err)
	}
	// Encryption is switched on as docs/kubernetes.md has it.
	server.Kubectl(t, "patch", "secret", "keys", "--namespace", namespace, "--type", "merge", "--patch",
		fmt.Sprintf(`{"stringData": {"current": "key-2", "key-2": "secret %s\nencryption %s\n"}}`, strings.Repeat("12", 32), strings.Repeat("34", 32)))
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(first), first); err != nil {
		t.Fatal(err)
	}
	for entry, encrypted := range map[string]bool{"key-1": false, "key-2": true} {
		if k, err := image.ParseKeys(first.Data[entry]); err != nil || (k.Encryption != nil) != encrypted {
			t.Errorf("entry %q: %v", entry, err)
		}
	}
	if again := made(); string(again.Data["current"]) != "key-2" || again.ResourceVersion != first.ResourceVersion {
		t.Error("the keys were changed")
	}
	c := &vmckptv1.VMCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "first"}}
	c.Spec.Source.Name, c.Spec.Storage.ClaimName = "vm", "claim"
	if err := admin.Create(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // other tests have the same server
		if err := admin.Delete(context.Background(), c); err != nil {
			t.Error(err)
		}
	})
	c.Status.Image = &vmckptv1.CheckpointImage{Name: "first", Path: "vmckpt/images/first", Digest: strings.Repeat("1", 64), Kind: vmckptv1.ImageBase}
	c.Succeeded(vmckptv1.ReasonCaptured, "captured", time.Now())
	if err := admin.Status().Update(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := admin.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if s := made(); s != nil {
		t.Errorf("keys were made in place of those that are lost: %v", s.Name)
	}
}

// TestServerAway is waited for: it is no reason for the manager to end.
func TestServerAway(t *testing.T) {
	server := shared.Server(t)
	server.InstallCRDs(t, "../../config/crd/bases")
	admin, namespace := server.Client(t), server.Namespace(t)
	server.StopAPIServer(t)
	retried := make(chan time.Duration, 100)
	maker := &keys.Maker{Client: admin, Clock: &soon{told: retried}, Namespace: namespace, Name: "keys"}
	ended := make(chan error, 1)
	go func() { ended <- maker.Start(t.Context()) }()
	for range 3 {
		select {
		case <-retried:
		case err := <-ended:
			t.Fatalf("it ended while nobody answered: %v", err)
		}
	}
	server.StartAPIServer(t)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if err := admin.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "keys"}, &corev1.Secret{}); err != nil {
		t.Fatal(err)
	}
}

// soon is a clock with short seconds, which tells how long was waited.
type soon struct {
	clock.RealClock
	told chan<- time.Duration
}

func (s *soon) After(d time.Duration) <-chan time.Time {
	select {
	case s.told <- d:
	default:
	}
	return time.After(d / 10)
}
