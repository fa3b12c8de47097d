package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// Leftover is an entry of tmp/: a writer's or deleter's directory, whether its owner lives or was killed, or something that is none
// of ours.
type Leftover struct {
	Path    string    // within the repository
	Bytes   int64     // of the volume that would be free without it: files that images have as well are not counted
	ModTime time.Time // what [Repository.Sweep] reckons its age from
	Alive   bool      // its writer or deleter lives: it is not left over yet
	Foreign bool      // of a name or kind that nothing here makes: it is Sweep's neither
}

// ownerPattern is how temporary names directories: as an [ID].
var ownerPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// foreign reports whether an entry of tmp/ is none that a writer, a deleter or [InitRepository] makes there: the volume is its owner's,
// who may keep files of their own in a directory of such a common name.
func foreign(name string, mode fs.FileMode) bool {
	switch {
	case mode.IsDir():
		return !ownerPattern.MatchString(name)
	case mode.IsRegular():
		return name != repositoryName
	}
	return true
}

// Leftovers lists what is in tmp/, by path. What cannot be told of an entry is an error beside the list of the others.
func (r *Repository) Leftovers(ctx context.Context) ([]Leftover, error) {
	list, err := r.leftovers(ctx)
	if err != nil {
		return list, fmt.Errorf("leftovers of repository %s: %w", r.path, err)
	}
	return list, nil
}

func (r *Repository) leftovers(ctx context.Context) ([]Leftover, error) {
	guard, err := r.lock(ctx, true)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	all, failed := r.entries()
	var list []Leftover
	for _, l := range all {
		if !l.Foreign {
			alive, living, err := r.claim(l)
			if alive != nil {
				alive.Close() // before the lock is let go, so that no Sweep takes us for the writer
			}
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			l.Alive = living
		}
		list = append(list, l)
	}
	guard.Close()
	for i := range list {
		if err := ctx.Err(); err != nil {
			return list, errors.Join(failed, err)
		}
		size, err := r.allocated(list[i].Path, leftoverDepth)
		list[i].Bytes, failed = size, errors.Join(failed, err)
	}
	return list, failed
}

// Sweep removes what writers left behind that were killed, if it is at least so old, and returns what it removed. What
// belongs to a writer that lives is never touched, however old, and neither is what nothing here makes: [Repository.Leftovers] tells
// of both. What cannot be told stays too, and is an error, once all else is removed.
func (r *Repository) Sweep(ctx context.Context, olderThan time.Duration) ([]string, error) {
	removed, err := r.sweep(ctx, time.Now().Add(-olderThan))
	if err != nil {
		return removed, fmt.Errorf("sweep repository %s: %w", r.path, err)
	}
	return removed, nil
}

func (r *Repository) sweep(ctx context.Context, before time.Time) (removed []string, err error) {
	guard, err := r.lock(ctx, true)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	type claimed struct {
		path  string
		alive *os.File // locked by us; nil if there is none
	}
	var dead []claimed
	defer func() {
		for _, l := range dead {
			if l.alive != nil {
				l.alive.Close()
			}
		}
	}()
	all, failed := r.entries()
	for _, l := range all {
		if l.Foreign || l.ModTime.After(before) {
			continue
		}
		alive, living, err := r.claim(l)
		if err != nil {
			failed = errors.Join(failed, err)
		} else if !living {
			dead = append(dead, claimed{l.Path, alive})
		}
	}
	guard.Close()
	for _, l := range dead {
		if err := ctx.Err(); err != nil {
			return removed, errors.Join(failed, err)
		}
		if err := r.removeTemporary(l.path, l.alive); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		removed = append(removed, l.path)
	}
	return removed, failed
}

// entries lists what is in tmp/, by path, but for what has to be asked of each: Bytes and Alive.
func (r *Repository) entries() (list []Leftover, err error) {
	all, err := names(r.root, temporaryDir)
	if err != nil {
		return nil, err
	}
	slices.Sort(all)
	var failed error
	for _, name := range all {
		path := temporaryDir + "/" + name
		info, err := r.root.Lstat(path)
		if err != nil {
			failed = errors.Join(failed, gone(err))
			continue
		}
		list = append(list, Leftover{Path: path, ModTime: info.ModTime(), Foreign: foreign(name, info.Mode())})
	}
	return list, failed
}

// claim finds out whether the owner of an entry lives. If not, it returns the file that says so, locked by us, or nil if there is
// none. The caller holds the repository's lock exclusively.
func (r *Repository) claim(l Leftover) (alive *os.File, living bool, err error) {
	// A directory without the file is one that was being made, or half removed, when its owner died: whoever lives holds the
	// repository's lock in that moment, and we have it.
	f, _, err := openRegularFor(r.root, l.Path+"/"+aliveName, os.O_RDWR)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), irregular(err):
		return nil, false, nil
	case err != nil:
		return nil, false, err
	}
	free, err := tryLock(f, true)
	if err != nil || !free {
		f.Close()
		return nil, !free, err
	}
	return f, false, nil
}

// leftoverDepth is how far beneath tmp/ the files of a leftover lie: in the image of a writer's directory.
const leftoverDepth = 3

// allocated returns how much of the volume would be free without a file, or a directory and what is in it.
func (r *Repository) allocated(path string, depth int) (sum int64, failed error) {
	info, err := r.root.Lstat(path)
	if err != nil {
		return 0, gone(err)
	}
	if !info.IsDir() {
		return allocatedBytes(info), nil
	}
	if depth == 0 {
		return 0, nil // nothing of ours: it need not be known how much
	}
	list, err := names(r.root, path)
	failed = gone(err)
	for _, name := range list {
		size, err := r.allocated(path+"/"+name, depth-1)
		sum, failed = sum+size, errors.Join(failed, err)
	}
	return sum, failed
}
