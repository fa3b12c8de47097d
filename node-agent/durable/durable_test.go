package durable

import (
	"os"
	"testing"
)

func TestWriteAndRemove(t *testing.T) {
	name := t.TempDir()
	dir, err := os.OpenRoot(name)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, value := range []string{"a value that is longer", "short"} {
		if err := WriteJSON(dir, "f", value); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name + "/f"); err != nil || string(got) != `"`+value+"\"\n" {
			t.Errorf("read %q, %v", got, err)
		}
	}
	if err := WriteJSON(dir, "f", func() {}); err == nil {
		t.Error("a function was written")
	}
	for range 2 { // gone, and still gone
		if err := Remove(dir, "f"); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(name); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
