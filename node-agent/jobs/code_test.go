package jobs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/node-agent/restore"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

func TestCodes(t *testing.T) {
	damage := &image.DamageError{Image: "base", File: "index"}
	process := &qemu.Process{PID: 7}
	refused := func(codes ...qemu.Code) error {
		e := &qemu.RefusedError{}
		for _, c := range codes {
			e.Reasons = append(e.Reasons, qemu.Reason{Code: c})
		}
		return e
	}
	for _, c := range []struct {
		err  error
		want Code
	}{
		{errors.New("what is this"), CodeUnexpected},
		{&supervise.JobError{Code: "damaged"}, CodeDamaged},
		{&supervise.DiedError{}, CodeDied},
		{supervise.ErrUnwanted, CodeInterrupted},
		{context.Canceled, CodeInterrupted},
		{context.DeadlineExceeded, CodeUnexpected},
		{&qemu.NoMatchError{}, CodeNoVM},
		{dirty.ErrGone, CodeNoVM},
		{&qemu.AmbiguousError{}, CodeAmbiguous},
		{&MonitorError{process, context.DeadlineExceeded}, CodeUnreachable},
		{&MonitorError{process, &fs.PathError{Op: "open", Path: "/proc/7/root", Err: syscall.EACCES}}, CodeNotPermitted},
		{fmt.Errorf("make repository: %w", &image.NotEmptyError{Name: "file"}), CodeExists},
		{fmt.Errorf("open: %w", image.ErrNotDirectory), CodeNotFound},
		{fmt.Errorf("delete: %w", image.ErrNotImage), CodeRefused},
		{&KeyError{Err: syscall.ENOSPC}, CodeNoSpace},
		{refused(qemu.CodeVFIO, qemu.CodeRunState), CodeRefused},
		{refused(qemu.CodeMigrationActive), CodeState},
		{&qemu.LayoutError{}, CodeRefused},
		{&capture.StateError{State: qemu.StateIOError}, CodeState},
		{capture.ErrMigrating, CodeState},
		{restore.ErrMigrating, CodeUnsteady},
		{&restore.StateError{State: qemu.StateRunning}, CodeState},
		{&capture.AttemptsError{Last: errors.New("disturbed")}, CodeUnsteady},
		{&capture.AttemptsError{Last: &image.SpaceError{}}, CodeUnsteady},
		{&capture.ResidueError{}, CodeUnsteady},
		{&capture.UnrestfulError{}, CodeUnsteady},
		{&restore.MismatchError{}, CodeMismatch},
		{capture.ErrNoParent, CodeParent},
		{&image.ParentError{Err: damage}, CodeParent},
		{damage, CodeDamaged},
		{image.ErrWrongKey, CodeWrongKey},
		{&image.SpaceError{Err: syscall.ENOSPC}, CodeNoSpace},
		{&dirty.BusyError{}, CodeBusy},
		{image.ErrBusy, CodeBusy},
		{image.ErrExists, CodeExists},
		{image.ErrNotFound, CodeNotFound},
		{&NoRepositoryError{Dir: "/srv"}, CodeNotFound},
		{&NoRepositoryError{Dir: "vmckpt", Volume: "/srv"}, CodeNoRepository},
		{&OtherRepositoryError{}, CodeNoRepository},
		{&KeyError{errors.New("no line \"secret\"")}, CodeKey},
		{&KeyError{image.ErrNotFound}, CodeNotFound},
		{syscall.EPERM, CodeNotPermitted},
		{&fs.PathError{Op: "open", Path: "/proc/7/mem", Err: syscall.EACCES}, CodeNotPermitted},
		{&fs.PathError{Op: "openat", Path: "images/base/index", Err: syscall.EACCES}, CodeNoAccess},
		{&fs.PathError{Op: "mkdir", Path: "/run/vmckpt", Err: syscall.EPERM}, CodeNoAccess},
		{&os.LinkError{Op: "link", Old: "a", New: "b", Err: syscall.EPERM}, CodeNoAccess},
		{syscall.EROFS, CodeNoAccess},
		{&restore.InvalidMemoryError{Err: context.Canceled}, CodeLost},
		{&restore.InvalidMemoryError{Err: damage}, CodeLost},
		{&restore.StoppedError{Err: supervise.ErrUnwanted, Why: qemu.ErrMonitorClosed}, CodeStopped},
		{&restore.StoppedError{Err: &supervise.DiedError{}, Why: &supervise.JobError{Code: "unreachable"}}, CodeStopped},
		{&restore.RestoredError{Err: &restore.StateError{State: qemu.StateIOError}}, CodeNotRunning},
		{&restore.RestoredError{Err: context.Canceled}, CodeNotRunning},
	} {
		for _, err := range []error{c.err, fmt.Errorf("capture web: %w", c.err)} {
			if got := CodeOf(err); got != c.want {
				t.Errorf("%T %v: %s, want %s", c.err, err, got, c.want)
			}
		}
	}
}
