package main

import (
	"context"
	"fmt"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// readyBound is half of what a kubelet waits for an answer, unless it is told otherwise.
const readyBound = 500 * time.Millisecond

// watched are the kinds without which the controllers do nothing, and what has to be installed for each.
func watched() []watchedKind {
	return []watchedKind{
		{&vmckptv1.VMCheckpoint{}, "VMckpt's CustomResourceDefinitions are not installed"},
		{&vmckptv1.VMRestore{}, "VMckpt's CustomResourceDefinitions are not installed"},
		{&kubevirtv1.VirtualMachine{}, "KubeVirt is not installed"},
		{&kubevirtv1.VirtualMachineInstance{}, "KubeVirt is not installed"},
		{&corev1.PersistentVolumeClaim{}, ""},
		{&corev1.PersistentVolume{}, ""},
		{&storagev1.StorageClass{}, ""},
		{&corev1.Node{}, ""},
	}
}

type watchedKind struct {
	object  client.Object
	missing string
}

func (k watchedKind) name() string { return reflect.TypeOf(k.object).Elem().Name() }

// synced is the check that the manager has read the cluster: that the API server was there, with every kind that the controllers watch and the
// rights to read it. One that does not lead reads them too, and is ready to take over. What it waits for is logged once: a prober is not told.
func synced(c cache.Cache, logger logr.Logger) healthz.Checker {
	var mu sync.Mutex
	said := ""
	return func(q *http.Request) error {
		err := unread(q.Context(), c)
		text := ""
		if err != nil {
			text = err.Error()
		}
		mu.Lock()
		defer mu.Unlock()
		if text != said && text != "" {
			logger.Info("the manager is not ready", "reason", text)
		}
		said = text
		return err
	}
}

// unread says what of the cluster has not been read yet.
func unread(ctx context.Context, c cache.Cache) error {
	ctx, cancel := context.WithTimeout(ctx, readyBound)
	defer cancel()
	for _, kind := range watched() {
		// It is asked for kind by kind: a cache calls itself synced that has all but those which there are not.
		informer, err := c.GetInformer(ctx, kind.object, cache.BlockUntilSynced(false))
		switch {
		case meta.IsNoMatchError(err) && kind.missing != "":
			return fmt.Errorf("%s: the API server has no kind %s", kind.missing, kind.name())
		case err != nil:
			return fmt.Errorf("the API server has not been read yet: %w", err)
		case !informer.HasSynced():
			return fmt.Errorf("the API server has not been read yet: no %s so far", kind.name())
		}
	}
	return nil
}
