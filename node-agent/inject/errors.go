package inject

import (
	"errors"
	"fmt"
	"syscall"
)

var (
	// ErrBusy: the thread did not come to wait in ppoll in the time given. Nothing was changed; try again later.
	ErrBusy = errors.New("thread does not wait in ppoll")

	// ErrTraced: another process traces the thread (a debugger, or another injection).
	ErrTraced = errors.New("already traced")

	// ErrGone: the process or the thread has ended, or the process id belongs to another one by now.
	ErrGone = errors.New("process is gone")

	// ErrStopped: the process is stopped by a signal (SIGSTOP and its like). Left as it is.
	ErrStopped = errors.New("process is stopped by a signal")

	// ErrSeccomp: the process is under a seccomp filter that this one may not suspend (it takes CAP_SYS_ADMIN and no
	// filter of one's own).
	ErrSeccomp = errors.New("its seccomp filter cannot be suspended")

	// ErrUnsupported: this architecture, or this kind of process, is not one that calls can be injected into.
	ErrUnsupported = errors.New("injection is not supported")

	// ErrIdentity: the descriptor number belongs to another file than the one meant.
	ErrIdentity = errors.New("descriptor belongs to another file")

	// ErrHelper: the helper process died before it answered, at its deadline or by a signal. The target goes on; a file
	// may have stayed open in it.
	ErrHelper = errors.New("injection helper did not answer")
)

// CallError is a system call that was executed inside the process and failed there.
type CallError struct {
	Call  string
	Errno syscall.Errno
}

func (e *CallError) Error() string { return fmt.Sprintf("injected %s: %v", e.Call, e.Errno) }
func (e *CallError) Unwrap() error { return e.Errno }

// failure is an error on its way from the helper to its parent.
type failure struct {
	Text  string        `json:"text"`
	Kind  int           `json:"kind,omitempty"` // 1 + its index in sentinels
	Call  string        `json:"call,omitempty"`
	Errno syscall.Errno `json:"errno,omitempty"`
}

func sentinels() []error {
	return []error{ErrBusy, ErrTraced, ErrGone, ErrStopped, ErrSeccomp, ErrUnsupported, ErrIdentity}
}

func newFailure(err error) *failure {
	f := &failure{Text: err.Error()}
	for i, s := range sentinels() {
		if errors.Is(err, s) {
			f.Kind = i + 1
		}
	}
	if call := (*CallError)(nil); errors.As(err, &call) {
		f.Call, f.Errno = call.Call, call.Errno
	}
	return f
}

// remoteError is a failure made an error again: the helper's text, with what can be acted on beneath.
type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

func (f *failure) err() error {
	e := &remoteError{text: f.Text}
	switch {
	case f.Call != "":
		e.cause = &CallError{Call: f.Call, Errno: f.Errno}
	case f.Kind > 0 && f.Kind <= len(sentinels()):
		e.cause = sentinels()[f.Kind-1]
	}
	return e
}
