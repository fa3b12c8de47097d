// Package node looks at the nodes that requests are bound to.
//
// An agent lives and dies with its node, and cannot say that it is gone: this is how the controllers know. A node that is not ready may come back
// with all that was on it, and is waited for. One whose object is gone does not.
package node

import (
	"context"
	"fmt"
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/controllers/verdict"
)

// State is what can be expected of a node's agent.
type State int

const (
	StateReady    State = iota
	StateNotReady       // it may come back
	StateGone           // there is no such node any more
)

// Look returns a node and its state. Of one that the cache does not have, the API server is asked (live): much is given up with it.
func Look(ctx context.Context, cached, live client.Reader, name string) (*corev1.Node, State, error) {
	n := &corev1.Node{}
	err := cached.Get(ctx, types.NamespacedName{Name: name}, n)
	if apierrors.IsNotFound(err) {
		err = live.Get(ctx, types.NamespacedName{Name: name}, n)
	}
	switch {
	case apierrors.IsNotFound(err):
		return nil, StateGone, nil
	case err != nil:
		return nil, 0, fmt.Errorf("read node %s: %w", name, err)
	case !Ready(n):
		return n, StateNotReady, nil
	}
	return n, StateReady, nil
}

// Ready reports whether a node's kubelet answers. One that has said nothing of it yet is taken for ready.
func Ready(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return true
}

// OfMachine returns the node where a machine is, if its agent can be expected to answer.
func OfMachine(ctx context.Context, r client.Reader, name string) (*corev1.Node, *verdict.Verdict, error) {
	n, state, err := Look(ctx, r, r, name)
	switch {
	case err != nil:
		return nil, nil, err
	case state == StateNotReady:
		return nil, verdict.Wait(vmckptv1.ReasonNode, fmt.Sprintf("node %s, where the virtual machine is, is not ready", name)), nil
	case state == StateGone:
		return nil, verdict.Wait(vmckptv1.ReasonNode, fmt.Sprintf("node %s, where the virtual machine was, is gone", name)), nil
	}
	return n, nil, nil
}

// Words puts before the message of a bound object that its node is not ready, and takes that off when it is again.
func Words(message, name string, state State) string {
	mark := fmt.Sprintf("node %s is not ready, and is waited for: ", name)
	message = strings.TrimPrefix(message, mark)
	if state == StateNotReady {
		return mark + message
	}
	return message
}

// Changed passes what can matter of nodes, and not the beats of their hearts.
func Changed() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, after := e.ObjectOld.(*corev1.Node), e.ObjectNew.(*corev1.Node)
		return Ready(before) != Ready(after) || before.Spec.Unschedulable != after.Spec.Unschedulable || !maps.Equal(before.Labels, after.Labels)
	}}
}
