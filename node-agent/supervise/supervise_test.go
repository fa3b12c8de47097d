package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var errTest = errors.New("the volume is full")

// roleVariable makes the test binary a supervisor that can be killed.
const roleVariable = "VMCKPT_SUPERVISE_TEST_ROLE"

func TestMain(m *testing.M) {
	Main(map[string]Job{
		"add": func(_ context.Context, request json.RawMessage, progress func(any)) (any, error) {
			var n []int
			if err := json.Unmarshal(request, &n); err != nil {
				return nil, err
			}
			sum := 0
			for _, x := range n {
				sum += x
				progress(sum)
			}
			return sum, nil
		},
		"fail": func(context.Context, json.RawMessage, func(any)) (any, error) {
			return nil, fmt.Errorf("write: %w", errTest)
		},
		"talk": func(_ context.Context, request json.RawMessage, _ func(any)) (any, error) {
			var bytes int
			if err := json.Unmarshal(request, &bytes); err != nil {
				return nil, err
			}
			return nil, errors.New(strings.Repeat("x", bytes))
		},
		"flood": func(_ context.Context, _ json.RawMessage, progress func(any)) (any, error) {
			progress(strings.Repeat("x", 2*reportBound))
			return nil, nil
		},
		"panic": func(context.Context, json.RawMessage, func(any)) (any, error) { panic("lost my way") },
		"wait": func(ctx context.Context, request json.RawMessage, progress func(any)) (any, error) {
			progress("waiting")
			<-ctx.Done()
			var file string
			json.Unmarshal(request, &file) //nolint:errcheck // null where there is none
			if file != "" {
				os.WriteFile(file, []byte(context.Cause(ctx).Error()), 0o600) //nolint:errcheck // the test looks for it
			}
			return nil, context.Cause(ctx)
		},
		"files": func(ctx context.Context, _ json.RawMessage, _ func(any)) (any, error) {
			files := Files(ctx)
			if len(files) != 1 {
				return nil, fmt.Errorf("%d files", len(files))
			}
			if _, err := files[0].WriteString("mine"); err != nil {
				return nil, err
			}
			out, err := exec.Command("ls", "-l", "/proc/self/fd").Output()
			return string(out), err
		},
		"stubborn": func(_ context.Context, _ json.RawMessage, progress func(any)) (any, error) {
			progress("waiting")
			select {}
		},
	}, func(err error) string {
		switch {
		case errors.Is(err, errTest):
			return "full"
		case errors.Is(err, ErrUnwanted):
			return "cancelled"
		}
		return "other"
	})
	if file, ok := os.LookupEnv(roleVariable); ok {
		os.Unsetenv(roleVariable)
		err := Run(context.Background(), "wait", file, nil, Options{Progress: func(json.RawMessage) { fmt.Println("waiting") }})
		fmt.Println(err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestResultAndProgress(t *testing.T) {
	var steps []string
	var sum int
	err := Run(t.Context(), "add", []int{1, 2, 3}, &sum, Options{Progress: func(p json.RawMessage) { steps = append(steps, string(p)) }})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"1", "3", "6"}, steps); diff != "" || sum != 6 {
		t.Errorf("sum %d, progress (-want +got):\n%s", sum, diff)
	}
}

func TestErrorKeepsItsCode(t *testing.T) {
	err := Run(t.Context(), "fail", nil, nil, Options{})
	var job *JobError
	if !errors.As(err, &job) || job.Code != "full" || job.Text != "write: the volume is full" {
		t.Errorf("error %#v", err)
	}
}

// What a machine answers may be of any length.
func TestLongReports(t *testing.T) {
	err := Run(t.Context(), "talk", 5<<20, nil, Options{})
	var job *JobError
	if !errors.As(err, &job) || len(job.Text) > 2*textBound || !strings.HasPrefix(job.Text, "xxx") {
		t.Errorf("an error of 5 MiB: %.200v", err)
	}
	err = Run(t.Context(), "flood", nil, nil, Options{})
	var died *DiedError
	if !errors.As(err, &died) || !strings.Contains(died.How, "too long") {
		t.Errorf("a report of twice the bound: %.200v", err)
	}
}

// TestFiles that the supervisor gives a worker are its own, and not its children's.
func TestFiles(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/given")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var children string
	if err := Run(t.Context(), "files", nil, &children, Options{Files: []*os.File{f}}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(children, f.Name()) {
		t.Errorf("a child of the worker has it open:\n%s", children)
	}
	if text, err := os.ReadFile(f.Name()); err != nil || string(text) != "mine" {
		t.Errorf("the file has %q: %v", text, err)
	}
}

func TestWorkerDies(t *testing.T) {
	for _, c := range []struct {
		job    string
		signal unix.Signal
		words  string
	}{{"panic", 0, "lost my way"}, {"wait", unix.SIGKILL, ""}, {"nonsense", 0, "no job"}} {
		t.Run(c.job, func(t *testing.T) {
			var pid int
			err := Run(t.Context(), c.job, nil, nil, Options{
				Started:  func(p int) { pid = p },
				Progress: func(json.RawMessage) { unix.Kill(pid, c.signal) }, //nolint:errcheck // the test shows
			})
			var died *DiedError
			if !errors.As(err, &died) || died.PID != pid || !strings.Contains(died.Last, c.words) {
				t.Errorf("error %v, want that worker %d died with %q", err, pid, c.words)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	for job, want := range map[string]func(error) bool{
		"wait":     func(err error) bool { var e *JobError; return errors.As(err, &e) && e.Code == "cancelled" },
		"stubborn": func(err error) bool { var e *DiedError; return errors.As(err, &e) },
	} {
		t.Run(job, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			err := Run(ctx, job, nil, nil, Options{Progress: func(json.RawMessage) { cancel() }, Grace: 200 * time.Millisecond})
			if !want(err) {
				t.Errorf("error %#v", err)
			}
		})
	}
}

// TestCommitted shows that a worker is not killed before what it does may be cut short.
func TestCommitted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asked := 0
	err := Run(ctx, "stubborn", nil, nil, Options{
		Progress:  func(json.RawMessage) { cancel() },
		Grace:     50 * time.Millisecond,
		Committed: func() bool { asked++; return asked < 4 },
	})
	var died *DiedError
	if !errors.As(err, &died) || asked != 4 {
		t.Errorf("asked %d times, then %v", asked, err)
	}
}

// TestSupervisorKilled shows that a worker ends in order when its supervisor is killed.
func TestSupervisorKilled(t *testing.T) {
	file := t.TempDir() + "/end"
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+file)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill() //nolint:errcheck // the test shows
	cmd.Wait()         //nolint:errcheck // killed
	deadline := time.Now().Add(10 * time.Second)
	for {
		if b, err := os.ReadFile(file); err == nil && len(b) > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the worker did not end in order after its supervisor was killed")
		}
		time.Sleep(5 * time.Millisecond)
	}
}
