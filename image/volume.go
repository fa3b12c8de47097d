package image

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// The owner of a volume can put a link in place of any directory on it. So where a repository is a directory of somebody else's volume, it is
// opened from the volume's root, and only if it is a directory itself.

// OpenRepositoryOn opens the repository in the directory name of the volume that is mounted at volume.
func OpenRepositoryOn(volume, name string, keys Keys) (*Repository, error) {
	path := filepath.Join(volume, name)
	if keys.Secret == ([32]byte{}) {
		return nil, fmt.Errorf("open repository %s: the secret is all zeros", path)
	}
	top, err := openTop(volume)
	if err != nil {
		return nil, fmt.Errorf("open repository %s: %w", path, notFoundWith(err))
	}
	defer top.Close()
	root, err := openDir(top, name)
	if err != nil {
		return nil, fmt.Errorf("open repository %s: %w", path, notFoundWith(err))
	}
	return openIn(root, path, keys)
}

// InitRepositoryOn makes a repository of the directory name of a volume, which it creates if need be; see [InitRepository].
func InitRepositoryOn(volume, name string) error {
	err := initOn(volume, name)
	if err != nil {
		return fmt.Errorf("make repository %s: %w", filepath.Join(volume, name), err)
	}
	return nil
}

func initOn(volume, name string) error {
	top, err := openTop(volume)
	if err != nil {
		return err
	}
	defer top.Close()
	if err := top.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return spaceError(rootDisk{top}, err)
	}
	root, err := openDir(top, name)
	if err != nil {
		return err
	}
	defer root.Close()
	return initIn(root, rootDisk{root}, rand.Reader)
}
