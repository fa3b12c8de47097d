package jobs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/image"
)

// keyBytes bounds what is read of a key file: more than a key file may have.
const keyBytes = 64 << 10

// ErrKeyInside says that the key file lies in the repository, where whoever owns the volume can read and replace it.
var ErrKeyInside = errors.New("it lies in the repository, open to whoever owns that volume")

// Keys reads the key file. It has to be a regular file of this user's or root's, which nobody else can read, outside the repository.
func (r Repository) Keys() (image.Keys, error) {
	keys, err := r.readKeys()
	if err != nil {
		return image.Keys{}, &KeyError{fmt.Errorf("key file %s: %w", r.KeyFile, err)}
	}
	return keys, nil
}

func (r Repository) readKeys() (image.Keys, error) {
	inside, err := r.keyInside()
	if err != nil {
		return image.Keys{}, err
	}
	if inside {
		return image.Keys{}, ErrKeyInside
	}
	// A pipe would have us wait for whoever writes to it.
	f, err := os.OpenFile(r.KeyFile, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return image.Keys{}, image.ErrNotFound // the path is said already
	}
	if err != nil {
		return image.Keys{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return image.Keys{}, err
	}
	if !info.Mode().IsRegular() {
		return image.Keys{}, fmt.Errorf("it is no regular file (mode %v)", info.Mode())
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return image.Keys{}, fmt.Errorf("others can read it (mode %v): chmod 600 it", mode)
	}
	// Another owner could put other keys in its place, under which images that nobody else vouches for would be believed.
	if owner, user := info.Sys().(*syscall.Stat_t).Uid, os.Geteuid(); int(owner) != user && owner != 0 {
		return image.Keys{}, fmt.Errorf("it belongs to user %d, and neither to user %d, who asks, nor to root: chown it", owner, user)
	}
	text, err := io.ReadAll(io.LimitReader(f, keyBytes))
	if err != nil {
		return image.Keys{}, err
	}
	return image.ParseKeys(text)
}

// keyInside says whether the key file lies in the repository, or would: by its own place, and by that of what it is a link to.
func (r Repository) keyInside() (bool, error) {
	dir, err := resolve(filepath.Join(r.Volume, r.Dir))
	if err != nil {
		return false, err
	}
	key, err := filepath.Abs(r.KeyFile)
	if err != nil {
		return false, err
	}
	place, err := resolve(filepath.Dir(key))
	if err != nil {
		return false, err
	}
	target, err := resolve(key)
	if err != nil {
		return false, err
	}
	return within(dir, filepath.Join(place, filepath.Base(key))) || within(dir, target), nil
}

// within says whether a path is a directory, or lies beneath it. Both are free of links.
func within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// resolve follows the links of a path, as far as it is there.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) || path == "/" {
		return resolved, err
	}
	parent, err := resolve(filepath.Dir(path))
	return filepath.Join(parent, filepath.Base(path)), err
}
