// Package keys makes the operator's keys where there are none.
package keys

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// ErrLost says that there are images and no keys.
var ErrLost = errors.New("there are images, and the keys that they were written with are gone")

// Maker makes the Secret with the keys of repositories, once, if there is none. It never changes one: without its keys no image can be read.
type Maker struct {
	Client    client.Client
	Clock     clock.Clock
	Namespace string
	Name      string
}

// note stands in the Secret, for whoever finds it.
const note = "Keys of VMckpt's repositories: without them no image can be read. Keep a copy elsewhere. " +
	"To change keys, add an entry and name it in \"current\"; leave the old ones as long as their images are needed."

// retryAfter is how long the n-th failure is waited over.
func retryAfter(n int) time.Duration { return min(time.Second<<min(n-1, 10), time.Minute) }

// Start makes the Secret; it runs where the controllers do, once. An API server that does not answer, or not yet with the rights for it, is asked
// again until ctx ends.
func (k *Maker) Start(ctx context.Context) error {
	for n := 1; ; n++ {
		err := k.make(ctx)
		if err == nil {
			return nil
		}
		wait := retryAfter(n)
		ctrl.LoggerFrom(ctx).Error(err, "the keys could not be seen to; trying again", "in", wait.String())
		select {
		case <-k.Clock.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

func (k *Maker) make(ctx context.Context) error {
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: k.Namespace, Name: k.Name, Annotations: map[string]string{"vmckpt.io/note": note}},
	}
	err := k.Client.Get(ctx, client.ObjectKeyFromObject(secret), &corev1.Secret{})
	if err == nil {
		return nil
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("look for the keys in Secret %s/%s: %w", k.Namespace, k.Name, err)
	}
	// Keys that were there and are lost are to be brought back, not replaced: new ones would read nothing.
	var checkpoints vmckptv1.VMCheckpointList
	if err := k.Client.List(ctx, &checkpoints); err != nil {
		return fmt.Errorf("look whether keys were in use: %w", err)
	}
	for i := range checkpoints.Items {
		if checkpoints.Items[i].Status.Image != nil {
			ctrl.LoggerFrom(ctx).Error(ErrLost, "no keys were made; bring the Secret back", "secret", k.Namespace+"/"+k.Name)
			return nil
		}
	}
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return err
	}
	// Without encryption: an image lies on a volume of those whose machine it is of. Whoever wants it adds an entry with a line for it.
	secret.StringData = map[string]string{"current": "key-1", "key-1": "secret " + hex.EncodeToString(key[:]) + "\n"}
	if err := k.Client.Create(ctx, secret); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make the keys in Secret %s/%s: %w", k.Namespace, k.Name, err)
	}
	ctrl.LoggerFrom(ctx).Info("keys were made; keep a copy of them elsewhere", "secret", k.Namespace+"/"+k.Name)
	return nil
}

// NeedLeaderElection says that one manager is enough.
func (k *Maker) NeedLeaderElection() bool { return true }
