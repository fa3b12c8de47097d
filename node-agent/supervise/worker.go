package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrUnwanted is the cause with which a job's context ends when its supervisor is gone or wants it no more.
var ErrUnwanted = errors.New("it was asked to end")

// textBound is the longest text of an error that is passed on, in bytes: it may have come from a machine that means ill.
const textBound = 64 << 10

func bounded(text string) string {
	if len(text) <= textBound {
		return text
	}
	return fmt.Sprintf("%s … (%d bytes more)", strings.ToValidUTF8(text[:textBound], ""), len(text)-textBound)
}

// Job is a piece of work as its worker runs it. progress may be called by any goroutine, at any rate. The result is encoded as
// JSON.
type Job func(ctx context.Context, request json.RawMessage, progress func(any)) (result any, err error)

type filesKey struct{}

// Files returns the files that the supervisor gave a job, which may close them: ctx is the job's. Called once.
func Files(ctx context.Context) []*os.File {
	n, _ := ctx.Value(filesKey{}).(int)
	var files []*os.File
	for i := range n {
		files = append(files, os.NewFile(uintptr(firstFile+i), fmt.Sprintf("file %d of the supervisor", i)))
	}
	return files
}

// Main does a job if this process was started as a worker, and does not return then. It must be called early in main. code names
// the error that a job ended with, for [JobError.Code].
func Main(jobs map[string]Job, code func(error) string) {
	name, ok := os.LookupEnv(jobVariable)
	if !ok {
		return
	}
	os.Unsetenv(jobVariable) // the worker's own children are no workers
	job := jobs[name]
	if job == nil {
		fmt.Fprintf(os.Stderr, "there is no job %q\n", name)
		os.Exit(2)
	}
	given, _ := strconv.Atoi(os.Getenv(filesVariable)) // none where there is no number
	os.Unsetenv(filesVariable)
	for i := range given {
		unix.CloseOnExec(firstFile + i) // they are the worker's, not its children's
	}
	ctx, cancel := context.WithCancelCause(context.WithValue(context.Background(), filesKey{}, given))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	go func() {
		<-signals
		cancel(ErrUnwanted)
	}()

	in := json.NewDecoder(os.Stdin)
	var request json.RawMessage
	if err := in.Decode(&request); err != nil {
		fmt.Fprintln(os.Stderr, "read the request:", err)
		os.Exit(2)
	}
	go func() {
		if _, err := io.Copy(io.Discard, os.Stdin); err == nil {
			cancel(fmt.Errorf("%w: the supervisor is gone", ErrUnwanted))
		}
	}()

	// A supervisor that is gone must not end the worker by a broken pipe, in the middle of letting its machine go.
	signal.Ignore(unix.SIGPIPE)
	var mu sync.Mutex
	write := func(r report) error {
		mu.Lock()
		defer mu.Unlock()
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	result, err := job(ctx, request, func(p any) {
		if b, err := json.Marshal(p); err == nil {
			write(report{Progress: b}) //nolint:errcheck // see above
		}
	})
	var last report
	if err == nil {
		last.Result, err = json.Marshal(result)
	}
	if err != nil {
		last = report{Error: &JobError{Code: code(err), Text: bounded(err.Error())}}
	}
	if err := write(last); err != nil {
		fmt.Fprintln(os.Stderr, "report the end of the job:", err)
		os.Exit(3)
	}
	os.Exit(0)
}
