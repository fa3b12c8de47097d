package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"
)

// InitRepository makes a repository of a directory, which it creates if need be. The errors to act on are [ErrExists], where it is a
// repository already, [*NotEmptyError], [ErrNotDirectory] and [*SpaceError]. What one that failed or was killed leaves is in nobody's way.
func InitRepository(dir string) error {
	if err := initRepository(dir, rand.Reader); err != nil {
		return fmt.Errorf("make repository %s: %w", dir, err)
	}
	return nil
}

func initRepository(dir string, random io.Reader) error {
	err := os.MkdirAll(dir, 0o700)
	var root *os.Root
	if err == nil {
		root, err = openTop(dir)
	}
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		return notDirectory(dir, err)
	case noSpace(err):
		return &SpaceError{Free: -1, Err: err}
	case err != nil:
		return err
	}
	defer root.Close()
	return initIn(root, rootDisk{root}, random)
}

// initIn makes a repository of an open directory.
func initIn(root *os.Root, d disk, random io.Reader) (err error) {
	defer func() { err = spaceError(d, err) }()
	// Before anything is made in it: a directory that is refused stays as it was.
	if err := checkEmpty(root); err != nil {
		return err
	}
	n, err := newID(random)
	if err != nil {
		return err
	}
	text, err := json.Marshal(repositoryInfo{Format: repositoryFormat, Version: formatVersion, ID: n})
	if err != nil {
		return err
	}
	guard, err := openLock(root)
	if err != nil {
		return err
	}
	defer guard.Close()
	// Two that do this at once must not both come to write their id.
	if err := lock(context.Background(), guard, true); err != nil {
		return err
	}
	if _, err := root.Lstat(repositoryName); err == nil {
		return ErrExists
	}
	for _, name := range []string{imagesDir, temporaryDir} {
		if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := gone(d.remove(unfinishedName)); err != nil {
		return err
	}
	if err := writeFile(d, unfinishedName, append(text, '\n')); err != nil {
		return errors.Join(err, gone(d.remove(unfinishedName)))
	}
	if err := d.rename(unfinishedName, repositoryName); err != nil {
		return errors.Join(err, d.remove(unfinishedName))
	}
	if err := d.syncDir("."); err != nil {
		// There, but perhaps not after a power cut: so not there.
		return errors.Join(fmt.Errorf("sync the directory: %w", err), d.remove(repositoryName))
	}
	return nil
}

// volumeNames are directories that file systems have at their top: ext4's, and those that snapshots are reached by.
var volumeNames = []string{"lost+found", ".snapshot", ".zfs"}

// checkEmpty fails with [ErrExists] or a [*NotEmptyError] unless there is nothing in a directory, but for what initIn leaves when it is
// interrupted, and what a volume has by nature.
func checkEmpty(root *os.Root) error {
	list, err := names(root, ".")
	if err != nil {
		return err
	}
	if slices.Contains(list, repositoryName) {
		return ErrExists
	}
	slices.Sort(list)
	for _, name := range list {
		info, err := root.Lstat(name)
		if err != nil {
			if gone(err) == nil {
				continue
			}
			return err
		}
		switch {
		case info.IsDir() && slices.Contains(volumeNames, name):
		case info.Mode().IsRegular() && name == lockName && info.Size() == 0:
		case info.IsDir() && (name == imagesDir || name == temporaryDir):
			beneath, err := names(root, name)
			if err != nil {
				return err
			}
			slices.Sort(beneath)
			for _, one := range beneath {
				if name+"/"+one != unfinishedName {
					return &NotEmptyError{name + "/" + one}
				}
			}
		default:
			return &NotEmptyError{name}
		}
	}
	return nil
}
