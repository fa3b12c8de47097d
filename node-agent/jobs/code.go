package jobs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

// Code says of an error what can be done about it. Its values are stable: scripts and conditions of objects see them.
type Code string

// The codes of errors.
const (
	CodeUnexpected   Code = "unexpected"    // none of the others: a bug, or a machine that is not well
	CodeNoVM         Code = "no-vm"         // no QEMU is what was asked for, or it has ended meanwhile
	CodeAmbiguous    Code = "ambiguous"     // more than one QEMU is what was asked for
	CodeUnreachable  Code = "unreachable"   // the QEMU is there, its monitor does not answer or there is none
	CodeNotFound     Code = "not-found"     // no such image, repository or key file
	CodeNoRepository Code = "no-repository" // a volume has not the repository that it should: it may not be mounted
	CodeExists       Code = "exists"        // an image of that name is there already, or something in a directory that was to become a repository
	CodeKey          Code = "key"           // the key file cannot be used
	CodeRefused      Code = "refused"       // the VM cannot be captured truly, or what was to be deleted is no image
	CodeState        Code = "state"         // not in the state the VM is in: stopped, migrating, running where it must stand
	CodeUnsteady     Code = "unsteady"      // the instant did not hold: somebody interferes, or the guest writes too fast
	CodeMismatch     Code = "mismatch"      // the image is of another machine
	CodeParent       Code = "parent"        // an increment was insisted on and cannot be made
	CodeDamaged      Code = "damaged"       // the image is not what was written
	CodeWrongKey     Code = "wrong-key"     // the image was written under another key
	CodeNoSpace      Code = "no-space"      // the repository's volume is full
	CodeBusy         Code = "busy"          // somebody else is at work on the VM or the image
	CodeNotPermitted Code = "not-permitted" // this user may not do it
	CodeNoAccess     Code = "no-access"     // this user may not read or write a file, or its volume is mounted read-only
	CodeLost         Code = "lost"          // a restore has begun to write the VM's memory and has not finished: it must not run
	CodeStopped      Code = "stopped"       // a restore stopped the VM, did not write to it and could not let it go on
	CodeNotRunning   Code = "not-running"   // a restore is complete, and the VM does not run as it was to
	CodeInterrupted  Code = "interrupted"   // it was asked to end
	CodeDied         Code = "worker-died"   // the worker process was killed, or crashed
)

// CodeOf returns the code of an error, in whichever process it is looked at.
func CodeOf(err error) Code {
	if job := as[*supervise.JobError](err); job != nil {
		return Code(job.Code)
	}
	switch {
	case as[*restore.InvalidMemoryError](err) != nil: // whatever it was caused by
		return CodeLost
	case as[*restore.StoppedError](err) != nil: // the same: how the VM was left matters more than why
		return CodeStopped
	case as[*restore.RestoredError](err) != nil:
		return CodeNotRunning
	case errors.Is(err, supervise.ErrUnwanted), errors.Is(err, context.Canceled):
		return CodeInterrupted
	case as[*supervise.DiedError](err) != nil:
		return CodeDied
	case as[*qemu.NoMatchError](err) != nil, errors.Is(err, dirty.ErrGone), errors.Is(err, inject.ErrGone):
		return CodeNoVM
	case as[*qemu.AmbiguousError](err) != nil:
		return CodeAmbiguous
	case as[*MonitorError](err) != nil:
		if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
			return CodeNotPermitted // another user's process, or its socket
		}
		return CodeUnreachable
	case as[*qemu.RefusedError](err) != nil:
		return refusedCode(as[*qemu.RefusedError](err))
	case as[*qemu.LayoutError](err) != nil:
		return CodeRefused
	case as[*restore.MismatchError](err) != nil:
		return CodeMismatch
	case errors.Is(err, capture.ErrStopped), errors.Is(err, capture.ErrMigrating), as[*restore.StateError](err) != nil:
		return CodeState
	case as[*capture.ResidueError](err) != nil, as[*capture.AttemptsError](err) != nil,
		as[*capture.UnrestfulError](err) != nil, errors.Is(err, restore.ErrResumed), errors.Is(err, restore.ErrMigrating):
		return CodeUnsteady
	case errors.Is(err, capture.ErrNoParent), as[*image.ParentError](err) != nil: // before its cause: the image asked for is not the damaged one
		return CodeParent
	case as[*image.DamageError](err) != nil:
		return CodeDamaged
	case errors.Is(err, image.ErrWrongKey):
		return CodeWrongKey
	case as[*image.SpaceError](err) != nil, errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT): // also that of the key file
		return CodeNoSpace
	case errors.Is(err, dirty.ErrBusy), errors.Is(err, image.ErrBusy), errors.Is(err, inject.ErrTraced):
		return CodeBusy
	case errors.Is(err, image.ErrExists), as[*image.NotEmptyError](err) != nil:
		return CodeExists
	case errors.Is(err, image.ErrNotImage):
		return CodeRefused
	case noRepository(err):
		return CodeNoRepository
	case errors.Is(err, image.ErrNotFound), errors.Is(err, image.ErrNotDirectory):
		return CodeNotFound
	case as[*KeyError](err) != nil:
		return CodeKey
	case ofFile(err):
		return CodeNoAccess
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return CodeNotPermitted
	}
	return CodeUnexpected
}

// ofFile tells the refusal of a file or directory, in a repository or of this host, from that of another process's memory: processes are looked at
// through /proc, and what is done to them otherwise names no path.
func ofFile(err error) bool {
	if errors.Is(err, syscall.EROFS) {
		return true
	}
	if !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.EPERM) {
		return false
	}
	path, links := as[*fs.PathError](err), as[*os.LinkError](err)
	return path != nil && !strings.HasPrefix(path.Path, "/proc/") || links != nil
}

// noRepository tells a volume without its repository from a directory that somebody named.
func noRepository(err error) bool {
	missing := as[*NoRepositoryError](err)
	return missing != nil && missing.Volume != "" || as[*OtherRepositoryError](err) != nil
}

// refusedCode tells a refusal that will pass from one that will not.
func refusedCode(e *qemu.RefusedError) Code {
	for _, r := range e.Reasons {
		if r.Code != qemu.CodeRunState && r.Code != qemu.CodeMigrationActive {
			return CodeRefused
		}
	}
	return CodeState
}

// as returns the error of type T in err's tree, or nil.
func as[T error](err error) T {
	var e T
	errors.As(err, &e)
	return e
}
