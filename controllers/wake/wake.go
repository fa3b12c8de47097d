// Package wake wakes the requests that wait for a claim or for a node.
package wake

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/vmckpt/vmckpt/controllers/node"
)

// AnyNode stands for the nodes of a request that waits for one, whichever it will be.
const AnyNode = "*"

// On has a controller watch all that makes a claim or a node usable. ofClaim lists the requests that wait for a claim, ofNode those that wait for
// a node of that name, or for [AnyNode].
func On(b *builder.Builder, ofClaim func(ctx context.Context, namespace, name string) []reconcile.Request, ofNode func(ctx context.Context, name string) []reconcile.Request) *builder.Builder {
	on := handler.EnqueueRequestsFromMapFunc
	return b.
		Watches(&corev1.PersistentVolumeClaim{}, on(func(ctx context.Context, o client.Object) []reconcile.Request {
			return ofClaim(ctx, o.GetNamespace(), o.GetName())
		})).
		Watches(&corev1.PersistentVolume{}, on(func(ctx context.Context, o client.Object) []reconcile.Request {
			ref := o.(*corev1.PersistentVolume).Spec.ClaimRef
			if ref == nil {
				return nil
			}
			return ofClaim(ctx, ref.Namespace, ref.Name)
		})).
		Watches(&storagev1.StorageClass{}, on(func(ctx context.Context, _ client.Object) []reconcile.Request {
			return ofNode(ctx, AnyNode)
		})).
		Watches(&corev1.Node{}, on(func(ctx context.Context, o client.Object) []reconcile.Request {
			return append(ofNode(ctx, o.GetName()), ofNode(ctx, AnyNode)...)
		}), builder.WithPredicates(node.Changed()))
}
