package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// helperName is the whole command line of the helper.
const helperName = "vmckpt-inject"

// stopBound is how long one stop may last, from PTRACE_SEIZE to PTRACE_DETACH. At the end of it the kernel kills the
// helper, and the thread runs on. A stop takes a fraction of a millisecond; two dozen changes between the thread and
// the helper are in it, and on a machine with four runnable threads to a processor hundreds of milliseconds were seen.
// The bound is for a stop that hangs.
const stopBound = 2 * time.Second

// request is what the helper is asked to do.
type request struct {
	PID       int           `json:"pid"`
	TID       int           `json:"tid"`       // the thread that is to do it; PID for the main one
	StartTime uint64        `json:"startTime"` // by which the process is known to be the one meant
	Wait      time.Duration `json:"waitNanoseconds"`
	Program   Program       `json:"program"`

	// For tests: the number of a step (counted from 1) at which the helper waits or kills itself, and how long it waits
	// there.
	PauseAt int           `json:"pauseAt,omitempty"`
	DieAt   int           `json:"dieAt,omitempty"`
	Pause   time.Duration `json:"pause,omitempty"`
}

// response is its answer.
type response struct {
	Report  Report   `json:"report"`
	Steps   []string `json:"steps"` // passed; see steps
	Failure *failure `json:"failure,omitempty"`
}

// Main does the helper's work and ends the process, if this process was started as the helper; otherwise it returns at
// once. main and TestMain call it before anything else.
func Main() {
	if len(os.Args) != 1 || os.Args[0] != helperName {
		return
	}
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(in io.Reader, out io.Writer) error {
	// ptrace obeys the thread that attached; the thread is never given back, since the process ends after this.
	runtime.LockOSThread()
	if err := settle(); err != nil {
		return err
	}
	checked := false // a resident helper has one thread to do with
	requests, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var req request
		if err := requests.Decode(&req); errors.Is(err, io.EOF) {
			return nil // whoever asks is done, or dead
		} else if err != nil {
			return fmt.Errorf("read the request: %w", err)
		}
		steps := &steps{pauseAt: req.PauseAt, dieAt: req.DieAt, pause: req.Pause}
		var answer response
		report, err := execute(req, steps, checked)
		if err != nil {
			answer.Failure = newFailure(err)
		}
		checked = err == nil
		answer.Report, answer.Steps = report, steps.passed
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
}

// settle makes the thread fit to hold another one stopped: no signal disturbs it and no page of it has to be read back
// while it does.
func settle() error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGTSTP) // sent to the process, other threads would take them
	all := unix.Sigset_t{}
	for i := range all.Val {
		all.Val[i] = ^all.Val[0]
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	// While it waits for a processor, so does the other thread. Without the privilege it goes on without.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -20)
	// Not more than a precaution, and RLIMIT_MEMLOCK may forbid it: PTRACE_SETREGS reads its registers from our memory,
	// and a page missing there would be the one place where it could be cut short.
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	return nil
}

// execute waits for the thread to be where it can be taken, takes it and runs the program. checked says that it was found fit for that before.
func execute(req request, steps *steps, checked bool) (Report, error) {
	if !checked {
		if err := preflight(req.PID, req.TID); err != nil {
			return Report{}, err
		}
	}
	if len(req.Program) == 0 {
		return Report{}, nil
	}
	bound, err := NewKillTimer()
	if err != nil {
		return Report{}, err
	}
	deadline := time.Now().Add(req.Wait)
	for attempts := 1; ; attempts++ {
		if err := awaitPark(req.PID, req.TID, deadline); err != nil {
			return Report{}, err
		}
		if err := bound.Set(stopBound); err != nil {
			return Report{}, err
		}
		report, err := stopAndRun(req, steps)
		report.Attempts = attempts
		if err := bound.Set(0); err != nil {
			return Report{}, err
		}
		if err != errMissed || time.Now().After(deadline) {
			return report, err
		}
	}
}

// awaitPark watches the thread until it sleeps in ppoll. A thread that is never seen asleep is taken as well: it
// is about to enter its ppoll all the time, and stopAndRun follows it there. One that sleeps in another call is left
// alone.
func awaitPark(pid, tid int, deadline time.Time) error {
	const (
		pause       = 200 * time.Microsecond
		busyEnough  = 20 // sightings in a row: awake for some milliseconds
		firstChance = 1  // a look is taken even when the deadline has passed
	)
	awake := 0
	for looks := 0; ; looks++ {
		where, err := readSyscall(pid, tid, tid != pid)
		if err != nil {
			return err
		}
		switch where {
		case parked:
			return nil
		case running:
			if awake++; awake >= busyEnough {
				return nil
			}
		case elsewhere:
			awake = 0
		}
		if looks >= firstChance && time.Now().After(deadline) {
			return ErrBusy
		}
		time.Sleep(pause)
	}
}

// steps records each instruction boundary that the work passes, and is where a test has the helper wait or die.
type steps struct {
	passed         []string
	pauseAt, dieAt int
	pause          time.Duration
}

func (s *steps) pass(name string) {
	s.passed = append(s.passed, name)
	switch len(s.passed) {
	case s.pauseAt:
		time.Sleep(s.pause)
	case s.dieAt:
		time.Sleep(s.pause)
		_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
	}
}
