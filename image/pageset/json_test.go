package pageset

import (
	"encoding/json"
	"testing"
)

// TestRunJSON holds the names of fields that answers of the command line have.
func TestRunJSON(t *testing.T) {
	text, err := json.Marshal(Run{First: 3, Count: 2})
	if err != nil || string(text) != `{"first":3,"count":2}` {
		t.Errorf("%s, %v", text, err)
	}
}
