package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"
)

// Resident is a helper that waits for programs: what has to be done while a machine is held cannot wait for a process to start.
// It ends with its parent. One goroutine uses it.
type Resident struct {
	pid, tid  int
	start     uint64
	cmd       *exec.Cmd
	input     io.WriteCloser
	output    *json.Decoder
	complaint bytes.Buffer
	dead      error
}

// StartResident starts a helper for thread tid of process pid, and returns once it is at work.
func StartResident(ctx context.Context, pid, tid int) (_ *Resident, err error) {
	r := &Resident{pid: pid, tid: tid}
	if r.start, err = startTime(pid); err != nil {
		return nil, err
	}
	r.cmd = helperCommand(context.Background()) // ended by Close
	r.cmd.Stderr = &r.complaint
	if r.input, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	output, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHelper, err)
	}
	r.output = json.NewDecoder(output)
	if _, err := r.Do(ctx, Program{}); err != nil { // does nothing, and brings its memory in
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Do executes a program in one stop of the thread. When the context ends the helper is killed, and no good afterwards.
func (r *Resident) Do(ctx context.Context, program Program) (Report, error) {
	answer, err := r.ask(ctx, request{PID: r.pid, TID: r.tid, StartTime: r.start, Wait: waitWithin(ctx), Program: program})
	if err != nil {
		return Report{}, fmt.Errorf("inject %v into thread %d of process %d: %w", program, r.tid, r.pid, err)
	}
	return answer.Report, nil
}

func (r *Resident) ask(ctx context.Context, req request) (response, error) {
	if r.dead != nil {
		return response{}, r.dead
	}
	var answer response
	done := make(chan error, 1)
	go func() {
		err := json.NewEncoder(r.input).Encode(req)
		if err == nil {
			err = r.output.Decode(&answer)
		}
		done <- err
	}()
	// Longer than the helper allows itself, for the case that it cannot even end itself.
	bound := time.NewTimer(req.Wait + 2*stopBound + time.Second)
	defer bound.Stop()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		r.kill()
		<-done
		err = context.Cause(ctx)
	case <-bound.C:
		r.kill()
		err = <-done
	}
	if err != nil {
		r.kill()
		r.dead = fmt.Errorf("%w: %w", ErrHelper, err)
		return response{}, r.dead
	}
	return answer, answer.check(req)
}

func (r *Resident) kill() { _ = r.cmd.Process.Kill() }

// Close ends the helper.
func (r *Resident) Close() error {
	r.input.Close()
	r.kill() // it waits for a program, or nobody waits for it
	_ = r.cmd.Wait()
	if r.dead == nil {
		r.dead = fmt.Errorf("%w: it was ended", ErrHelper)
	}
	return nil
}
