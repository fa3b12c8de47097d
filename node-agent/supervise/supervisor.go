package supervise

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options says how a job is run. The zero value is right for most.
type Options struct {
	// Progress is called, by one goroutine, with every report of progress.
	Progress func(json.RawMessage)

	// Started is called with the worker's process id once it runs.
	Started func(pid int)

	// Grace is how long a worker that was asked to end may take before it is killed; zero means DefaultGrace.
	Grace time.Duration

	// Committed, where it is set, says that the work has come so far that ending it does more harm than its end is worth. Such a worker
	// is asked to end, and not killed before it is so no more; that is left to the caller, who knows its pid.
	Committed func() bool

	// Files are for the worker, which has them by [Files]. They stay the caller's: what a worker that is killed has open is closed, and
	// these are not.
	Files []*os.File

	// Env is added to the worker's environment.
	Env []string
}

// DefaultGrace is how long a worker may take to end when its work is not wanted any more: it has a machine to let go and a temporary
// directory to remove.
const DefaultGrace = 10 * time.Second

// Run does a job in a worker and stores what it returns in result, which may be nil. When ctx ends the worker is asked to end, and
// killed if it does not, in [Options].Grace. An error of the job's is a *[JobError], a worker that died a *[DiedError].
func Run(ctx context.Context, job string, request, result any, o Options) error {
	input, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("encode the %s request: %w", job, err)
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), o.Env...), jobVariable+"="+job, filesVariable+"="+strconv.Itoa(len(o.Files)))
	cmd.ExtraFiles = o.Files
	// A signal from a terminal is for the supervisor, which then asks the worker in its own way.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	var words tail
	cmd.Stderr = &words
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start the %s worker: %w", job, err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start the %s worker: %w", job, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the %s worker: %w", job, err)
	}
	// Children of the worker hold its standard error for a moment longer than it lives; they end by themselves.
	cmd.WaitDelay = time.Second
	if o.Started != nil {
		o.Started(cmd.Process.Pid)
	}
	// The newline ends values such as a number, whose end a decoder does not see before the next byte.
	go stdin.Write(append(input, '\n')) //nolint:errcheck // a worker that does not read it says so, or died

	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-ctx.Done():
			cmd.Process.Signal(unix.SIGTERM) //nolint:errcheck // it may be gone
			for {
				select {
				case <-time.After(o.Grace):
				case <-ended:
					return
				}
				if o.Committed == nil || !o.Committed() {
					break
				}
			}
			cmd.Process.Kill() //nolint:errcheck // it may be gone
		case <-ended:
		}
	}()

	var last *report
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, reportBound)
	for lines.Scan() {
		var r report
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			continue // not a report: the worker died in the middle of a line
		}
		if r.Progress != nil {
			if o.Progress != nil {
				o.Progress(r.Progress)
			}
			continue
		}
		last = &r
	}
	// A line beyond all bounds: nobody reads on, and the worker would wait for that with its machine.
	tooLong := lines.Err()
	if tooLong != nil {
		cmd.Process.Kill() //nolint:errcheck // it may be gone
	}
	stdin.Close()
	how := "ended"
	if err := cmd.Wait(); err != nil {
		how = err.Error()
	}
	if tooLong != nil {
		how = fmt.Sprintf("its report: %v", tooLong)
		last = nil
	}
	switch {
	case last == nil:
		return &DiedError{Job: job, PID: cmd.Process.Pid, How: how, Last: words.String()}
	case last.Error != nil:
		return last.Error
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(last.Result, result); err != nil {
		return fmt.Errorf("decode the result of the %s worker: %w", job, err)
	}
	return nil
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if extra := len(t.b) - tailBytes; extra > 0 {
		t.b = append(t.b[:0], t.b[extra:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.TrimSpace(string(t.b)) }
