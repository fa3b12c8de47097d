package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// longestWait bounds a program whose context has no nearer deadline. QEMU's main loop comes to its ppoll within
// milliseconds, and within a second or two while it flushes disks.
const longestWait = 5 * time.Second

// answerTime is what the helper keeps in hand to come back with ErrBusy before the context's deadline kills it.
const answerTime = 200 * time.Millisecond

// NewUserfaultfd makes a userfaultfd for asynchronous write protection in process pid: see [OpenUserfaultfd]. It stays open
// there; local is a duplicate of it.
func NewUserfaultfd(ctx context.Context, pid int) (remote RemoteFile, local *os.File, err error) {
	return newShared(ctx, pid, OpenUserfaultfd())
}

// NewSyncUserfaultfd makes a userfaultfd for faults of every kind in process pid: see [OpenSyncUserfaultfd]. It stays open
// there until [CloseFD]; local is a duplicate of it.
func NewSyncUserfaultfd(ctx context.Context, pid int) (remote RemoteFile, local *os.File, err error) {
	return newShared(ctx, pid, OpenSyncUserfaultfd())
}

func newShared(ctx context.Context, pid int, op Operation) (RemoteFile, *os.File, error) {
	remote, err := newFile(ctx, pid, op)
	if err != nil {
		return RemoteFile{}, nil, err
	}
	local, err := remote.Duplicate(pid)
	if err != nil {
		return RemoteFile{}, nil, errors.Join(err, CloseFD(ctx, pid, remote))
	}
	return remote, local, nil
}

// NewPipe makes a pipe in process pid, whose write end alone stays open there: see [OpenPipe].
func NewPipe(ctx context.Context, pid int) (RemoteFile, error) {
	return newFile(ctx, pid, OpenPipe())
}

// NewMemfd makes a file in memory in process pid: see [OpenMemfd]. It is filled from outside through /proc/PID/fd/N.
func NewMemfd(ctx context.Context, pid int, name string) (RemoteFile, error) {
	return newFile(ctx, pid, OpenMemfd(name))
}

func newFile(ctx context.Context, pid int, op Operation) (RemoteFile, error) {
	report, err := Do(ctx, pid, Program{op})
	if err != nil {
		return RemoteFile{}, err
	}
	return report.Files[0], nil
}

// CloseFD closes a file in process pid: see [Close]. [ErrIdentity], and nothing closed, where the descriptor is another
// file by now.
func CloseFD(ctx context.Context, pid int, file RemoteFile) error {
	_, err := Do(ctx, pid, Program{Close(file)})
	return err
}

// A thread that is traced is asked for again for so long, so often.
const (
	tracedWait = 3 * time.Second
	tracedPoll = 50 * time.Millisecond
)

// Do executes a program in process pid, in one stop of its main thread. It waits for that thread to be in ppoll until the
// context's deadline, five seconds at most ([ErrBusy]); when the context is cancelled the helper is killed, and a file may
// stay open in the process.
func Do(ctx context.Context, pid int, program Program) (Report, error) {
	answer, err := runHelper(ctx, request{PID: pid, TID: pid, Program: program})
	// The helper of somebody who was killed comes to its end by itself, in milliseconds.
	until := time.Now().Add(tracedWait)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(until) {
		until = deadline.Add(-stopBound) // with time left for one that succeeds
	}
	for errors.Is(err, ErrTraced) && time.Now().Before(until) && ctx.Err() == nil {
		time.Sleep(tracedPoll)
		answer, err = runHelper(ctx, request{PID: pid, TID: pid, Program: program})
	}
	if err != nil {
		return Report{}, fmt.Errorf("inject %v into process %d: %w", program, pid, err)
	}
	return answer.Report, nil
}

// String names the operations.
func (p Program) String() string {
	var b bytes.Buffer
	for i, op := range p {
		if i > 0 {
			b.WriteByte('+')
		}
		b.WriteString(string(op.Kind))
	}
	return b.String()
}

// runHelper starts the helper, hands it the request and waits for its answer.
func runHelper(ctx context.Context, req request) (response, error) {
	start, err := startTime(req.PID)
	if err != nil {
		return response{}, err
	}
	if req.TID == 0 {
		req.TID = req.PID
	}
	req.StartTime = start
	req.Wait = waitWithin(ctx)
	input, err := json.Marshal(req)
	if err != nil {
		return response{}, err
	}
	// The helper kills itself a little after its time; this is for the case that it cannot even do that.
	ctx, cancel := context.WithTimeout(ctx, req.Wait+2*stopBound+time.Second)
	defer cancel()
	var output, complaint bytes.Buffer
	cmd := helperCommand(ctx)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &output, &complaint
	runErr := cmd.Run()
	var answer response
	if runErr == nil {
		runErr = json.Unmarshal(output.Bytes(), &answer)
	}
	if runErr != nil && ctx.Err() != nil {
		runErr = fmt.Errorf("%w: %w", context.Cause(ctx), runErr) // it was killed because of that
	}
	if runErr != nil {
		return response{}, fmt.Errorf("%w: %w%s", ErrHelper, runErr, firstLine(complaint.Bytes()))
	}
	return answer, answer.check(req)
}

// waitWithin is how long the helper may wait for the thread, so that its answer comes before the context's deadline.
func waitWithin(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return longestWait
	}
	left := time.Until(deadline)
	return min(longestWait, left-min(left/4, answerTime))
}

// helperCommand is the helper's process, its files and its end left to the caller.
func helperCommand(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe") // the same binary, though its file may have been replaced
	cmd.Args = []string{helperName}
	cmd.Env = []string{"GODEBUG=asyncpreemptoff=1", "GOGC=off"} // nothing from outside; no signals and pauses of the runtime's own
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-Z at our terminal must not stop it
	return cmd
}

// check returns what the helper says went wrong.
func (r *response) check(req request) error {
	if r.Failure != nil {
		return r.Failure.err()
	}
	if len(r.Report.Files) != len(req.Program) {
		return fmt.Errorf("%w: %d results for %d operations", ErrHelper, len(r.Report.Files), len(req.Program))
	}
	return nil
}

// firstLine gives the first line of what the helper said on its standard error.
func firstLine(complaint []byte) string {
	line, _, _ := bytes.Cut(complaint, []byte("\n"))
	if len(line) == 0 {
		return ""
	}
	return ": " + string(line)
}
