package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"

	"github.com/vmckpt/vmckpt/image/pageset"
)

var (
	// ErrNotFound: the repository has no image (or the directory no repository) of that name.
	ErrNotFound = errors.New("not found")
	// ErrExists: an image of that name exists already, or the directory is a repository already.
	ErrExists = errors.New("exists already")
	// ErrWrongKey: the image is sound as far as can be told, but was written under another secret or encryption key.
	ErrWrongKey = errors.New("written under another key")
	// ErrBusy: the image is in use by a writer that copies from it. Try again when that is done.
	ErrBusy = errors.New("in use by a writer")
	// ErrNotImage: what has the name of an image was not made here. Who wants it away removes it otherwise.
	ErrNotImage = errors.New("not an image")
	// ErrNotDirectory: something else than a directory was named as a repository.
	ErrNotDirectory = errors.New("not a directory")
	// ErrClosed: the image or the writer was closed, sealed or aborted before.
	ErrClosed = errors.New("closed")
)

// NotEmptyError says that a directory was to become a repository that has something in it already. A repository has it for itself: what
// is in its tmp/ and images/ is removed by their names.
type NotEmptyError struct {
	Name string // of one thing in it, by its path from the directory
}

func (e *NotEmptyError) Error() string {
	return fmt.Sprintf("the directory has something in it (%q): choose an empty one, or a new sub-directory", e.Name)
}

// DamageError says that bytes in the repository are not what was written there, and where.
type DamageError struct {
	Image  string // name of the image
	File   string // name of the file within the image's directory; "." for the directory itself
	Offset int64  // byte in File at which the damaged part begins; -1 where that cannot be told
	What   string // what is wrong there
	Err    error  // what the system said, where it could not read them at all
}

func (e *DamageError) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("image %s is damaged: %s: %s", e.Image, e.File, e.What)
	}
	return fmt.Sprintf("image %s is damaged: %s at byte %d: %s", e.Image, e.File, e.Offset, e.What)
}

func (e *DamageError) Unwrap() error { return e.Err }

// readError is the error of reading a file of an image at offset, or of opening it: damage, if it is the file that cannot be read,
// as opposed to any.
func readError(image, file string, offset int64, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &DamageError{Image: image, File: file, Offset: 0, What: "is missing"}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &DamageError{Image: image, File: file, Offset: offset, What: "the file ends early"}
	case irregular(err), unreadable(err):
		return &DamageError{Image: image, File: file, Offset: offset, What: fmt.Sprintf("cannot be read: %v", err), Err: err}
	}
	return fmt.Errorf("image %s: read %s at byte %d: %w", image, file, offset, err)
}

// SpaceError says that the repository's volume has too little room, found out beforehand or while writing.
type SpaceError struct {
	Need int64 // bytes wanted; 0 where the volume just ran full
	Free int64 // bytes free to this user when it was found out; -1 if unknown
	Err  error // what the system said, if it was the system that said it
}

func (e *SpaceError) Error() string {
	switch {
	case e.Need == 0 && e.Free < 0:
		return fmt.Sprintf("the repository's volume is full: %v", e.Err)
	case e.Need == 0:
		return fmt.Sprintf("the repository's volume is full: %v (%s free)", e.Err, mebibytes(e.Free))
	}
	return fmt.Sprintf("the repository's volume has %s free, %s are needed", mebibytes(e.Free), mebibytes(e.Need))
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (e *SpaceError) Unwrap() error { return e.Err }

// MissingPagesError says that a base image was to be sealed with pages nobody submitted or marked.
type MissingPagesError struct {
	Block string
	Run   pageset.Run // the first run that is missing
}

func (e *MissingPagesError) Error() string {
	return fmt.Sprintf("pages %v of block %s were neither submitted nor marked absent", e.Run, e.Block)
}

// ParentError says that an image cannot be the parent of the one asked for. A base can be written instead.
type ParentError struct {
	Parent string
	Reason string
	Err    error // the cause, if there is one beneath: a [DamageError], [ErrNotFound]
}

func (e *ParentError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("image %s cannot be a parent: %s: %v", e.Parent, e.Reason, e.Err)
	}
	return fmt.Sprintf("image %s cannot be a parent: %s", e.Parent, e.Reason)
}

func (e *ParentError) Unwrap() error { return e.Err }

// VisibleError says that an image was sealed and is visible, but that the volume did not say that it would stay so after a power
// cut, nor let the image be taken back. Whoever does not want it deletes it.
type VisibleError struct {
	Image string
	Err   error
}

func (e *VisibleError) Error() string {
	return fmt.Sprintf("image %s is visible, though it may not outlive a power cut: %v", e.Image, e.Err)
}

func (e *VisibleError) Unwrap() error { return e.Err }

// noSpace reports whether err is the system's word for a full volume or a used-up quota.
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// noLinks reports whether err means that a hard link cannot be had here, though a copy may: a file system without them,
// a limit on links to one file reached, another file system, or a kernel that protects links to files of other owners.
func noLinks(err error) bool {
	for _, e := range []error{syscall.EPERM, syscall.EXDEV, syscall.EMLINK, syscall.ENOTSUP, syscall.EOPNOTSUPP, syscall.ENOSYS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// notDirectory says with ErrNotDirectory what it is that the system calls none: dir, or one in its path.
func notDirectory(dir string, err error) error {
	at := dir
	if typed := new(fs.PathError); errors.As(err, &typed) {
		at = strings.TrimSuffix(typed.Path, "/.") // see openTop
	}
	return fmt.Errorf("%s is %w", at, ErrNotDirectory)
}

// notFound turns the system's "no such file" into ErrNotFound.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNotFound
	}
	return err
}
