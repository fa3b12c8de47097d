//go:build linux

package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInitOnFullVolume makes a repository where there is no room for its files, or not as much as for its directory.
func TestInitOnFullVolume(t *testing.T) {
	for _, options := range []string{"size=4k", "nr_inodes=2", "nr_inodes=4"} {
		t.Run(options, func(t *testing.T) {
			volume := t.TempDir()
			if err := unix.Mount("none", volume, "tmpfs", 0, options); err != nil {
				t.Skipf("mounting a small volume: %v", err)
			}
			defer unix.Unmount(volume, unix.MNT_DETACH)
			ballast := filepath.Join(volume, "ballast")
			if err := os.WriteFile(ballast, make([]byte, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(volume, "a", "repository")
			err := InitRepository(dir)
			if space := new(SpaceError); !errors.As(err, &space) || !errors.Is(err, unix.ENOSPC) {
				t.Errorf("on a full volume: %v", err)
			}
			if err := unix.Mount("none", volume, "", unix.MS_REMOUNT, "size=1m,nr_inodes=100"); err != nil {
				t.Fatal(err)
			}
			if err := InitRepository(dir); err != nil {
				t.Errorf("and then with room: %v", err)
			}
		})
	}
}
