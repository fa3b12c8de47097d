package capture

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPartsAddUpToThePause(t *testing.T) {
	for _, c := range []struct {
		name  string
		total time.Duration
		parts []Phase
		want  []Phase
	}{
		{"all seen", 5, []Phase{{"stop", 2}, {"let go", 3}}, []Phase{{"stop", 2}, {"let go", 3}}},
		{"the answer came late", 5, []Phase{{"stop", 2}, {"scan", 1}, {"let go", 30}}, []Phase{{"stop", 2}, {"scan", 1}, {"let go", 2}}},
		{"time unseen", 9, []Phase{{"stop", 2}, {"let go", 3}}, []Phase{{"stop", 2}, {"let go", 3}, {"other", 4}}},
	} {
		p := Pause{Total: c.total, Parts: c.parts}
		p.balance()
		if diff := cmp.Diff(c.want, p.Parts); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}
