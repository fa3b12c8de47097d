package verdict_test

import (
	"errors"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/vmckpt/vmckpt/controllers/verdict"
)

// TestAgain tells what is to be looked at again from what went wrong.
func TestAgain(t *testing.T) {
	deleted := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	for name, test := range map[string]struct {
		err   error
		again bool
		wrong bool
	}{
		"done":             {nil, false, false},
		"overtaken":        {apierrors.NewConflict(schema.GroupResource{}, "a", nil), true, false},
		"wrong":            {errors.New("wrong"), false, true},
		"just deleted":     {verdict.AgentsTurn(deleted, deleted.Add(time.Second)), true, false},
		"deleted long ago": {verdict.AgentsTurn(deleted, deleted.Add(time.Minute)), false, false},
		"clocks disagree":  {verdict.AgentsTurn(deleted, deleted.Add(-time.Minute)), false, false},
	} {
		if result, err := verdict.Again(test.err); (result.RequeueAfter > 0) != test.again || (err != nil) != test.wrong {
			t.Errorf("%s: %+v, %v", name, result, err)
		}
	}
}
