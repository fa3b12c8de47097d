package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: tracing a process of another user, /dev/userfaultfd, suspending a seccomp filter")
	}
}

func shortly(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// everything is a program of all that can be opened.
func everything() Program {
	return Program{OpenUserfaultfd(), OpenPipe(), OpenMemfd("inject-test"), OpenSyncUserfaultfd()}
}

func TestOpenAndClose(t *testing.T) {
	needRoot(t)
	cases := []struct {
		name  string
		op    Operation
		links string // regular expression of the new descriptor's link
	}{
		{"userfaultfd", OpenUserfaultfd(), `^anon_inode:\[userfaultfd\]$`},
		{"sync userfaultfd", OpenSyncUserfaultfd(), `^anon_inode:\[userfaultfd\]$`},
		{"pipe", OpenPipe(), `^pipe:\[\d+\]$`},
		{"memfd", OpenMemfd("vm state"), `^/memfd:vm state \(deleted\)$`},
		{"memfd of the longest name", OpenMemfd(strings.Repeat("n", 249)), `^/memfd:n{249} \(deleted\)$`},
	}
	for _, mode := range []string{childForever, childTicks, childSpins, childForever + "+seccomp"} {
		t.Run(mode, func(t *testing.T) {
			c := startChild(t, mode)
			before := c.ask().Descriptors
			for _, tc := range cases {
				t.Run(tc.name, func(t *testing.T) {
					report, err := Do(shortly(t), c.pid(), Program{tc.op})
					if err != nil {
						t.Fatal(err)
					}
					file := report.Files[0]
					seen := c.ask()
					added := slices.DeleteFunc(slices.Clone(seen.Descriptors), func(link string) bool { return slices.Contains(before, link) })
					if len(added) != 1 || !regexp.MustCompile(tc.links).MatchString(added[0]) || added[0] != file.Link {
						t.Errorf("descriptors %q came up; reported is %+v", added, file)
					}
					if !closedOnExec(t, c.pid(), file.FD) {
						t.Error("descriptor stays open across exec")
					}
					if err := CloseFD(shortly(t), c.pid(), file); err != nil {
						t.Error(err)
					}
					seen = c.ask()
					if diff := cmp.Diff(before, seen.Descriptors); diff != "" {
						t.Errorf("descriptors before and after (-before +after):\n%s", diff)
					}
					if len(seen.Odd) > 0 || seen.Interrupted > 0 {
						t.Errorf("the child saw it: %d times EINTR, odd results %q", seen.Interrupted, seen.Odd)
					}
				})
			}
		})
	}
}

func closedOnExec(t *testing.T, pid, fd int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	for line := range strings.Lines(string(text)) {
		_, _ = fmt.Sscanf(line, "flags: %o", &flags)
	}
	return flags&unix.O_CLOEXEC != 0
}

func TestProgramIsOneStop(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	report, err := Do(shortly(t), c.pid(), everything())
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Files) != 4 || report.Attempts != 1 {
		t.Errorf("report %+v", report)
	}
	for _, file := range report.Files {
		if err := file.Check(c.pid()); err != nil {
			t.Error(err)
		}
	}
	if seen := c.ask(); len(seen.Odd) > 0 || seen.Returns != 1 {
		t.Errorf("the child saw it: %+v", seen)
	}
}

func TestFailureClosesWhatWasOpened(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	before := c.ask().Descriptors
	notThere := RemoteFile{FD: 0, Inode: 1, Link: "pipe:[1]"}
	_, err := Do(shortly(t), c.pid(), append(everything(), Close(notThere)))
	if !errors.Is(err, ErrIdentity) {
		t.Errorf("got %v, want %v", err, ErrIdentity)
	}
	if diff := cmp.Diff(before, c.ask().Descriptors); diff != "" {
		t.Errorf("descriptors before and after (-before +after):\n%s", diff)
	}
}

func TestCloseNeedsTheSameFile(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	first, err := NewPipe(shortly(t), c.pid())
	if err != nil {
		t.Fatal(err)
	}
	if err := CloseFD(shortly(t), c.pid(), first); err != nil {
		t.Fatal(err)
	}
	second, err := NewPipe(shortly(t), c.pid())
	if err != nil {
		t.Fatal(err)
	}
	if second.FD != first.FD {
		t.Fatalf("descriptor %d after %d: this test counts on the lowest free one", second.FD, first.FD)
	}
	if err := CloseFD(shortly(t), c.pid(), first); !errors.Is(err, ErrIdentity) {
		t.Errorf("got %v, want %v", err, ErrIdentity)
	}
	if _, err := first.Duplicate(c.pid()); !errors.Is(err, ErrIdentity) {
		t.Errorf("duplicate: got %v, want %v", err, ErrIdentity)
	}
	if err := second.Check(c.pid()); err != nil {
		t.Error(err)
	}
}

func TestPipeHasOneEnd(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	file, err := NewPipe(shortly(t), c.pid())
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", c.pid(), file.FD)
	writer, err := os.OpenFile(path, os.O_WRONLY, 0) // as QEMU would: it must not wait for a reader
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if _, err := writer.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write without a reader: got %v, want %v", err, unix.EPIPE)
	}
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := writer.Write([]byte("x")); err != nil {
		t.Errorf("write with a reader: %v", err)
	}
	var b [1]byte
	if _, err := reader.Read(b[:]); err != nil || b[0] != 'x' {
		t.Errorf("read %q: %v", b, err)
	}
}

func TestRefusals(t *testing.T) {
	needRoot(t)
	cases := []struct {
		name    string
		mode    string
		prepare func(t *testing.T, c *child)
		want    error
		before  bool // preflight sees it as well
	}{
		{"not in ppoll", childSleeps, func(*testing.T, *child) {}, ErrBusy, false},
		{"traced", childForever, trace, ErrTraced, true},
		{"stopped", childForever, func(t *testing.T, c *child) { stopProcess(t, c) }, ErrStopped, true},
		{"gone", childForever, func(t *testing.T, c *child) { _ = c.cmd.Process.Kill(); _ = c.cmd.Wait() }, ErrGone, true},
		{"a zombie", childForever, func(t *testing.T, c *child) {
			_ = c.cmd.Process.Kill()
			awaitState(t, c.pid(), 'Z')
		}, ErrGone, true},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			c := startChild(t, tc.mode)
			tc.prepare(t, c)
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			if _, err := NewPipe(ctx, c.pid()); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if err := preflight(c.pid(), c.pid()); errors.Is(err, tc.want) != tc.before || err != nil != tc.before {
				t.Errorf("preflight: %v", err)
			}
		})
	}
}

// trace traces the child from a thread of this process until the test ends.
func trace(t *testing.T, c *child) {
	done, end := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- ptrace(unix.PTRACE_SEIZE, c.pid(), 0, 0)
		<-end
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(end) })
}

func stopProcess(t *testing.T, c *child) {
	if err := unix.Kill(c.pid(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awaitState(t, c.pid(), 'T')
}

func awaitState(t *testing.T, pid int, state byte) {
	t.Helper()
	for range 2000 {
		s, err := readStatus(pid)
		if err != nil {
			t.Fatal(err)
		}
		if s.state == state {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("process %d did not come into state %c", pid, state)
}

// TestStopDuringTheWork lets a SIGSTOP come at every moment: the process is stopped afterwards, and goes on when continued.
func TestStopDuringTheWork(t *testing.T) {
	needRoot(t)
	c := startChild(t, childForever)
	for i := range 40 {
		done := make(chan error)
		go func() {
			_, err := NewPipe(shortly(t), c.pid())
			done <- err
		}()
		time.Sleep(time.Duration(i) * 500 * time.Microsecond)
		stopProcess(t, c)
		if err := <-done; err != nil && !errors.Is(err, ErrStopped) && !errors.Is(err, ErrBusy) {
			t.Fatal(err)
		}
		awaitState(t, c.pid(), 'T')
		if err := unix.Kill(c.pid(), unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		c.ask()
	}
}

// TestKilledDuringTheWork lets the process die at every moment.
func TestKilledDuringTheWork(t *testing.T) {
	needRoot(t)
	for i := range 30 {
		c := startChild(t, childForever)
		done := make(chan error)
		go func() {
			_, err := Do(shortly(t), c.pid(), everything())
			done <- err
		}()
		time.Sleep(time.Duration(i) * time.Millisecond)
		_ = c.cmd.Process.Kill()
		if err := <-done; err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("after %d ms: %v", i, err)
		}
		_ = c.cmd.Wait()
	}
}

func TestTimeoutIsNotProlonged(t *testing.T) {
	needRoot(t)
	c := startChild(t, childSlow)
	begin := c.ask().Returns
	end := time.Now().Add(10 * slowTick)
	rounds := 0
	for ; time.Now().Before(end); rounds++ {
		file, err := NewPipe(shortly(t), c.pid())
		if err != nil {
			t.Fatal(err)
		}
		if err := CloseFD(shortly(t), c.pid(), file); err != nil {
			t.Fatal(err)
		}
	}
	if ticks := c.ask().Returns - begin - 1; ticks < 7 || ticks > 11 {
		t.Errorf("%d timeouts passed in the time of ten, with %d injections in it", ticks, 2*rounds)
	}
}

// TestManyTimes injects often enough to meet the thread everywhere.
func TestManyTimes(t *testing.T) {
	needRoot(t)
	for _, mode := range []string{childForever, childTicks, childSpins} {
		t.Run(mode, func(t *testing.T) {
			c := startChild(t, mode)
			before := c.ask().Descriptors
			for range 25 {
				report, err := Do(shortly(t), c.pid(), everything())
				if err != nil {
					t.Fatal(err)
				}
				var undo Program
				for _, f := range report.Files {
					undo = append(undo, Close(f))
				}
				if _, err := Do(shortly(t), c.pid(), undo); err != nil {
					t.Fatal(err)
				}
			}
			seen := c.ask()
			if diff := cmp.Diff(before, seen.Descriptors); diff != "" || len(seen.Odd) > 0 || seen.Interrupted > 0 {
				t.Errorf("the child saw it: %+v\n%s", seen, diff)
			}
		})
	}
}

// TestHelperDiesAnywhere kills the helper at every step it takes, both at once and after the thread had time to get to
// its next stop unseen, and has the child show that it goes on.
func TestHelperDiesAnywhere(t *testing.T) {
	needRoot(t)
	for _, mode := range []string{childForever, childTicks} {
		t.Run(mode, func(t *testing.T) {
			c := startChild(t, mode)
			names := stepsOf(t, c, everything())
			for at, name := range names {
				for range 2 {
					for _, after := range []time.Duration{0, 2 * time.Millisecond} {
						_, err := runHelper(shortly(t), request{PID: c.pid(), Program: everything(), DieAt: at + 1, Pause: after})
						if !errors.Is(err, ErrHelper) {
							t.Fatalf("killed at step %d, %s: got %v, want %v", at+1, name, err, ErrHelper)
						}
						c.ask()
					}
				}
			}
			// What leaked by it is allowed; that it still can be done is asked for.
			if _, err := Do(shortly(t), c.pid(), everything()); err != nil {
				t.Error(err)
			}
			t.Logf("%d steps; %d descriptors in the end", len(names), len(c.ask().Descriptors))
		})
	}
}

// stepsOf returns the names of the steps that a program takes.
func stepsOf(t testing.TB, c *child, program Program) []string {
	t.Helper()
	answer, err := runHelper(shortly(t), request{PID: c.pid(), Program: program})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Steps
}

// TestSignalsSurvive sends one signal at each step, with the helper going on and with it killed there. The child has it
// blocked but for its ppoll, so each one shows there as EINTR: once, and for certain.
func TestSignalsSurvive(t *testing.T) {
	needRoot(t)
	c := startChild(t, childMasked)
	program := Program{OpenPipe()}
	names := stepsOf(t, c, program)
	want := c.ask().Interrupted
	for at, name := range names {
		for _, die := range []bool{false, true} {
			req := request{PID: c.pid(), Program: program, PauseAt: at + 1, Pause: 4 * time.Millisecond}
			if die {
				req.PauseAt, req.DieAt = 0, at+1
			}
			done := make(chan error, 1)
			go func() {
				_, err := runHelper(shortly(t), req)
				done <- err
			}()
			for len(done) == 0 {
				if s, err := readStatus(c.pid()); err != nil {
					t.Fatal(err)
				} else if s.tracer != 0 {
					break
				}
			}
			time.Sleep(2 * time.Millisecond)
			if err := unix.Tgkill(c.pid(), c.pid(), unix.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			want++
			if err := <-done; err != nil && !errors.Is(err, ErrHelper) {
				t.Errorf("step %d, %s: %v", at+1, name, err)
			}
			got := c.ask().Interrupted
			for tries := 0; got < want && tries < 50; tries++ {
				// Our question was there as the signal came: ppoll answers that first, and the signal when it finds none.
				time.Sleep(time.Millisecond)
				got = c.ask().Interrupted
			}
			if got != want {
				t.Errorf("step %d, %s, helper killed: %v: %d signals were sent, %d arrived", at+1, name, die, want, got)
				want = got
			}
		}
	}
}

func BenchmarkStop(b *testing.B) {
	needRoot(b)
	c := startChild(b, childForever)
	for _, tc := range []struct {
		name    string
		program Program
	}{
		{"pipe", Program{OpenPipe()}},
		{"userfaultfd", Program{OpenUserfaultfd()}},
		{"userfaultfd+pipe", Program{OpenUserfaultfd(), OpenPipe()}},
		{"sync-userfaultfd", Program{OpenSyncUserfaultfd()}},
	} {
		b.Run(tc.name, func(b *testing.B) {
			var stops []time.Duration
			for b.Loop() {
				report, err := Do(shortly(b), c.pid(), tc.program)
				if err != nil {
					b.Fatal(err)
				}
				stops = append(stops, report.Stop)
				for _, f := range report.Files {
					if err := CloseFD(shortly(b), c.pid(), f); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(median(stops).Microseconds()), "µs-stop-median")
			b.ReportMetric(float64(stops[len(stops)*9/10].Microseconds()), "µs-stop-p90")
		})
	}
}

// median sorts the durations and returns the middle one.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func TestOpenForWriting(t *testing.T) {
	dir := t.TempDir()
	written, err := os.Create(dir + "/written")
	if err != nil {
		t.Fatal(err)
	}
	defer written.Close()
	read, err := os.Open(dir + "/written")
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	files, err := OpenForWriting(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			t.Error(err)
		}
		if strings.HasPrefix(name, dir) {
			names = append(names, name)
		}
		f.Close()
	}
	if len(names) != 1 || names[0] != written.Name() {
		t.Errorf("open for writing in %s: %v", dir, names)
	}
}
