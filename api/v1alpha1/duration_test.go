package v1alpha1

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestRestoreDuration is not finer than its start, unless somebody has measured it.
func TestRestoreDuration(t *testing.T) {
	begun := time.Date(2026, 5, 4, 3, 2, 1, 900e6, time.UTC)
	kept := metav1.Time{Time: begun}.Rfc3339Copy() // as the API server gives it back
	for name, test := range map[string]struct {
		told *metav1.Duration
		took time.Duration
		want time.Duration
	}{
		"by the start":        {nil, 2500 * time.Millisecond, 3 * time.Second},
		"by the start, short": {nil, 50 * time.Millisecond, 0},
		"a clock put back":    {nil, -time.Minute, 0},
		"measured":            {&metav1.Duration{Duration: 2437 * time.Millisecond}, 2500 * time.Millisecond, 2437 * time.Millisecond},
	} {
		r := &VMRestore{}
		r.Status.StartTime, r.Status.Duration = &kept, test.told
		r.Succeeded(ReasonRestored, "restored", begun.Add(test.took))
		if r.Status.Duration == nil || r.Status.Duration.Duration != test.want {
			t.Errorf("%s: %v, want %v", name, r.Status.Duration, test.want)
		}
	}
}
