package capture

import (
	"errors"
	"testing"
)

func TestAttemptsCounted(t *testing.T) {
	last := errors.New("nothing held")
	for attempts, want := range map[int]string{
		1: "the machine could not be held for its instant: nothing held",
		5: "the machine could not be held for its instant in 5 attempts, last: nothing held",
	} {
		if got := (&AttemptsError{attempts, last}).Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
