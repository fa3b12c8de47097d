package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"syscall"
)

// What is in a repository's directory.
const (
	repositoryName = "repository.json"
	lockName       = "lock"
	imagesDir      = "images"
	temporaryDir   = "tmp"

	// In a writer's temporary directory: the file whose lock says that the writer lives, and what becomes the image.
	aliveName = "alive"
	stageName = "image"

	// unfinishedName is what repository.json is called until it is whole.
	unfinishedName = temporaryDir + "/" + repositoryName
)

// Repository is a directory of images, opened with keys. Safe for concurrent use, here and by other processes.
type Repository struct {
	path string // for messages
	root *os.Root
	disk disk
	id   ID
	keys derived
}

// writeFile writes a whole new file and syncs it.
func writeFile(d disk, name string, content []byte) error {
	f, err := d.create(name)
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	_, err = f.WriteAt(content, 0)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// OpenRepository opens a repository. Keys are tried on its images only: a repository has none of its own to compare.
func OpenRepository(dir string, keys Keys) (*Repository, error) {
	if keys.Secret == ([32]byte{}) {
		return nil, fmt.Errorf("open repository %s: the secret is all zeros", dir)
	}
	root, err := openTop(dir)
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("open repository: %w", notDirectory(dir, err))
	}
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", notFoundWith(err))
	}
	return openIn(root, dir, keys)
}

// openIn opens the repository in an open directory, which it takes over. dir is its path, for messages.
func openIn(root *os.Root, dir string, keys Keys) (*Repository, error) {
	r := &Repository{path: dir, root: root, disk: rootDisk{root}, keys: derive(keys)}
	text, err := readSmall(root, repositoryName, 4096)
	if err == nil {
		r.id, err = decodeRepository(text)
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open repository %s: %s: %w", dir, repositoryName, notFoundWith(err))
	}
	return r, nil
}

// ID is the repository's own: it stays the same wherever the directory is copied or mounted.
func (r *Repository) ID() ID { return r.id }

// Close lets go of the directory. Images that were opened stay usable; a writer must have ended before.
func (r *Repository) Close() error { return r.root.Close() }

// openLock opens the file that the repository is locked by. It holds nothing.
//
// The lock is shared while a writer's temporary directory comes into being, links to its parent's files included, and
// exclusive while an image is taken out of sight or leftovers are told from living writers. So neither sees the other
// half done. It is never held for longer than that takes.
func openLock(root *os.Root) (*os.File, error) {
	f, _, err := openRegularFor(root, lockName, os.O_RDWR)
	for tries := 0; errors.Is(err, fs.ErrNotExist) && tries < 10; tries++ {
		// Of several that find none each may make it, and only one does.
		f, err = root.OpenFile(lockName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			f, _, err = openRegularFor(root, lockName, os.O_RDWR)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the repository's lock: %w", err)
	}
	return f, nil
}

func (r *Repository) lock(ctx context.Context, exclusive bool) (*os.File, error) {
	f, err := openLock(r.root)
	if err != nil {
		return nil, err
	}
	err = lock(ctx, f, exclusive)
	// Whoever locks is about to make, rename and remove in these. Were one of them a link to the other, Sweep would take images
	// for leftovers.
	for _, name := range []string{imagesDir, temporaryDir} {
		if err == nil {
			err = r.checkDir(name)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// checkDir fails where something else stands than a directory.
func (r *Repository) checkDir(name string) error {
	info, err := r.root.Lstat(name)
	if err == nil && !info.IsDir() {
		return &irregularError{name: name, want: "directory", mode: info.Mode()}
	}
	return gone(err)
}

func imagePath(name string) string { return imagesDir + "/" + name }

// openImageDir opens an image's directory.
func (r *Repository) openImageDir(name string) (*os.Root, error) {
	if err := r.checkDir(imagesDir); err != nil {
		return nil, err
	}
	dir, err := openDir(r.root, imagePath(name))
	if irregular(err) || unreadable(err) {
		err = readError(name, ".", -1, err)
	}
	return dir, err
}

// Summary is what can be said of an image without opening more than its manifest. An image is known as another's parent by its digest;
// one that cannot be read has none, and may be the parent of whoever names it.
type Summary struct {
	Name     string
	Manifest Manifest // zero where Err is set
	Digest   Digest   // of the manifest
	Err      error    // why the image cannot be opened: [ErrWrongKey], [*DamageError]
}

// Images lists the images of the repository by name, those that cannot be opened too.
func (r *Repository) Images(ctx context.Context) ([]Summary, error) {
	list, err := names(r.root, imagesDir)
	if err != nil {
		return nil, fmt.Errorf("list repository %s: %w", r.path, err)
	}
	slices.Sort(list)
	summaries := make([]Summary, 0, len(list))
	for _, name := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if CheckName(name) != nil {
			continue // nothing that was written here by us
		}
		s := Summary{Name: name}
		dir, err := r.openImageDir(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			s.Err = err
			summaries = append(summaries, s)
			continue
		}
		m, digest, err := r.readManifest(dir, name)
		dir.Close()
		if err != nil {
			s.Err = err
		} else {
			s.Manifest, s.Digest = *m, digest
		}
		summaries = append(summaries, s)
	}
	return summaries, nil
}

func (r *Repository) readManifest(dir *os.Root, name string) (*Manifest, Digest, error) {
	read := func(file string, limit int64) ([]byte, error) {
		content, err := readSmall(dir, file, limit)
		var size *sizeError
		switch {
		case errors.As(err, &size):
			return nil, &DamageError{Image: name, File: file, Offset: limit, What: err.Error()}
		case err != nil:
			return nil, readError(name, file, 0, err)
		}
		return content, nil
	}
	mac, err := read(macName, int64(macFileBytes))
	if err != nil {
		return nil, Digest{}, err
	}
	manifest, err := read(manifestName, manifestLimit)
	if err != nil {
		return nil, Digest{}, err
	}
	m, err := decodeManifest(&r.keys, r.id, name, manifest, mac)
	if err != nil {
		return nil, Digest{}, err
	}
	return m, manifestDigest(manifest), nil
}

// temporary makes a new directory beneath tmp/ and locks it as alive. The caller holds the repository's lock, so that
// nobody sees the directory without its lock.
func (r *Repository) temporary() (dir string, alive *os.File, err error) {
	n, err := newID(rand.Reader)
	if err != nil {
		return "", nil, err
	}
	dir = temporaryDir + "/" + n.String()
	if err := r.root.Mkdir(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("make a temporary directory: %w", err)
	}
	made := dir
	defer func() {
		if err != nil {
			r.disk.removeAll(made)
		}
	}()
	alive, err = r.root.OpenFile(dir+"/"+aliveName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", nil, fmt.Errorf("make a temporary directory: %w", err)
	}
	ok, err := tryLock(alive, true)
	if err == nil && !ok {
		err = fmt.Errorf("temporary directory %s is locked by somebody else", dir)
	}
	if err != nil {
		alive.Close()
		return "", nil, err
	}
	return dir, alive, nil
}

// Delete takes an image out of the repository, a damaged one too; keys do not matter. No other image is touched: what it
// shares with them stays theirs. The errors to act on are [ErrNotFound], [ErrBusy] and [ErrNotImage].
func (r *Repository) Delete(ctx context.Context, name string) error {
	if err := r.delete(ctx, name); err != nil {
		return fmt.Errorf("delete image %s: %w", name, err)
	}
	return nil
}

func (r *Repository) delete(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	guard, err := r.lock(ctx, true)
	if err != nil {
		return err
	}
	defer guard.Close()
	info, err := r.root.Lstat(imagePath(name))
	if err != nil {
		return notFound(err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %w", ErrNotImage, &irregularError{name: imagePath(name), want: "directory", mode: info.Mode()})
	}
	if err := r.checkImage(name); err != nil {
		return err
	}
	if err := r.unused(name); err != nil {
		return err
	}
	dir, alive, err := r.temporary()
	if err != nil {
		return err
	}
	defer alive.Close()
	// Out of sight by one rename, so that nobody ever finds half an image under a name.
	if err := r.disk.rename(imagePath(name), dir+"/"+stageName); err != nil {
		return errors.Join(err, r.removeTemporary(dir, alive))
	}
	if err := r.disk.syncDir(imagesDir); err != nil {
		return err
	}
	guard.Close()
	err = r.removeTemporary(dir, alive)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EBUSY) {
		return nil // on NFS somebody here has a file of it open; the image is gone, and what is left is Sweep's
	}
	return err
}

// Names of an image's files. Others have files of the common names as well, but not of the rest.
var (
	commonNames = regexp.MustCompile(`^(` + regexp.QuoteMeta(manifestName) + `|` + indexName + `)$`)
	ownNames    = regexp.MustCompile(`^(` + regexp.QuoteMeta(macName) + `|` + stateName + `|[0-9a-f]{32}\.(pages|hashes))$`)
)

// checkImage returns [ErrNotImage] for a directory that no image is left of, however damaged: somebody else made it, and it may
// be all that they have. One file of an image's own names makes it one; where there is none, there must be nothing in it but files of
// the common names, if anything.
func (r *Repository) checkImage(name string) error {
	list, err := names(r.root, imagePath(name))
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, ownNames.MatchString) {
		return nil
	}
	slices.Sort(list)
	for _, file := range list {
		if !commonNames.MatchString(file) {
			return fmt.Errorf("%w: it has %q, and nothing that only images have", ErrNotImage, file)
		}
	}
	return nil
}

// unused returns [ErrBusy] if a writer copies from the image. With the repository's lock held exclusively, none begins to.
func (r *Repository) unused(name string) error {
	f, _, err := openRegularFor(r.root, imagePath(name)+"/"+macName, os.O_RDWR)
	switch {
	case errors.Is(err, fs.ErrNotExist), irregular(err):
		return nil // so damaged that nobody copies from it
	case err != nil:
		return err
	}
	defer f.Close()
	if free, err := tryLock(f, true); err != nil {
		return err
	} else if !free {
		return ErrBusy
	}
	return nil
}

// removeTemporary removes a directory beneath tmp/ and closes its file alive (nil: it has none), whose lock is ours. That goes
// last, and closed: NFS keeps a file that is removed while it is open, under another name, and with it the directory.
func (r *Repository) removeTemporary(dir string, alive *os.File) error {
	if alive == nil {
		return r.disk.removeAll(dir)
	}
	list, _ := names(r.root, dir)
	for _, name := range list {
		if name != aliveName {
			r.disk.removeAll(dir + "/" + name) // what fails shows in the end
		}
	}
	alive.Close()
	return r.disk.removeAll(dir)
}
