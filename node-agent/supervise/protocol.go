package supervise

import (
	"encoding/json"
	"fmt"
)

// jobVariable marks a process as a worker; its value is the job's name.
const jobVariable = "VMCKPT_WORKER_JOB"

// filesVariable says how many files the worker was given; they are its descriptors from firstFile on (os/exec, Cmd.ExtraFiles).
const (
	filesVariable = "VMCKPT_WORKER_FILES"
	firstFile     = 3
)

// The worker reads one JSON value, the request, from its standard input, which then stays open: its end means that nobody wants
// the work any more. It writes one report a line to its standard output.

// report is one line from the worker; one field is set.
type report struct {
	Progress json.RawMessage `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *JobError       `json:"error,omitempty"`
}

// reportBound is the longest line taken from a worker, in bytes.
const reportBound = 4 << 20

// JobError is an error that a job ended with, carried over from its process. Code tells callers what to do about it, Text tells
// people.
type JobError struct {
	Code string `json:"code"`
	Text string `json:"text"`
}

func (e *JobError) Error() string { return e.Text }

// DiedError says that a worker ended without saying how its job went.
type DiedError struct {
	Job  string
	PID  int
	How  string // as the kernel tells it: "signal: killed", "exit status 2"
	Last string // the end of what it wrote to its standard error
}

func (e *DiedError) Error() string {
	s := fmt.Sprintf("the %s worker (pid %d) died: %s", e.Job, e.PID, e.How)
	if e.Last != "" {
		s += "; its last words: " + e.Last
	}
	return s
}
