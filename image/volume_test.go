package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestRepositoryOnVolume(t *testing.T) {
	volume := t.TempDir()
	if _, err := OpenRepositoryOn(volume, "vmckpt", testKeys(false)); !errors.Is(err, ErrNotFound) {
		t.Errorf("open what is not there: %v", err)
	}
	if err := InitRepositoryOn(volume, "vmckpt"); err != nil {
		t.Fatal(err)
	}
	if err := InitRepositoryOn(volume, "vmckpt"); !errors.Is(err, ErrExists) {
		t.Errorf("made twice: %v", err)
	}
	r, err := OpenRepositoryOn(volume, "vmckpt", testKeys(false))
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
}

// TestRepositoryOnVolumeIsNoLink shows that a link, planted where the repository is to be, is not followed.
func TestRepositoryOnVolumeIsNoLink(t *testing.T) {
	elsewhere, volume := t.TempDir(), t.TempDir()
	if err := InitRepository(elsewhere); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(volume, "other")
	if err := os.Mkdir(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{elsewhere, "other"} {
		link := filepath.Join(volume, "vmckpt")
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenRepositoryOn(volume, "vmckpt", testKeys(false)); err == nil {
			t.Errorf("opened through a link to %s", to)
		}
		if err := InitRepositoryOn(volume, "vmckpt"); err == nil || errors.Is(err, ErrExists) {
			t.Errorf("made through a link to %s: %v", to, err)
		}
		os.Remove(link)
	}
	if list, err := os.ReadDir(inside); err != nil || len(list) != 0 {
		t.Errorf("made in the link's target: %v, %v", list, err)
	}
}
