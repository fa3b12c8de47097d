package guard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writer stands for QEMU: it writes a device state into the pipe, as QEMU does with writev(2) of 32 KiB at a time, and tells how
// that ended. It keeps a write end of its own open as well, as QEMU does, so that the end of the stream is no end of file.
type writer struct {
	stream []byte
	pipe   *os.File
	done   chan error // gets one value when the stream is written, or could not be
}

// newWriter makes a pipe and a stream of n random bytes. The read end is the caller's.
func newWriter(t *testing.T, n int) (*writer, *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	w := &writer{stream: make([]byte, n), pipe: os.NewFile(uintptr(fds[1]), "write end"), done: make(chan error, 1)}
	t.Cleanup(func() { w.pipe.Close() })
	for i := range w.stream {
		w.stream[i] = byte(rand.Uint32())
	}
	return w, os.NewFile(uintptr(fds[0]), "read end")
}

// begin writes the stream, like QEMU at the command.
func (w *writer) begin() {
	go func() {
		for rest := w.stream; len(rest) > 0; {
			n, err := unix.Write(int(w.pipe.Fd()), rest[:min(len(rest), 32<<10)])
			if err != nil {
				w.done <- err
				return
			}
			rest = rest[n:]
		}
		w.done <- nil
	}()
}

func (w *writer) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-w.done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the writer hangs: a guest would stand still for ever")
		return nil
	}
}

const streamBytes = 316_924 // as long as a real one

func start(t *testing.T, o Options) *Leash {
	t.Helper()
	l, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func TestHoldAndRelease(t *testing.T) {
	w, pipe := newWriter(t, streamBytes)
	l := start(t, Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: 5 * time.Second})
	w.begin()
	if err := l.Held(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-w.done:
		t.Fatalf("the writer was done (%v) while it was held", err)
	case <-time.After(300 * time.Millisecond): // a hold that fails to hold shows within microseconds
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if err := w.wait(t); err != nil {
		t.Fatal(err)
	}
	got, err := l.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, w.stream) {
		t.Fatalf("the stream of %d bytes differs from what was written", len(got))
	}
}

// TestHoldShort holds the device state of a machine with hardly any devices.
func TestHoldShort(t *testing.T) {
	const n = 28_394
	w, pipe := newWriter(t, n)
	l := start(t, Options{Pipe: pipe, StreamBytes: n, HoldBound: 5 * time.Second})
	w.begin()
	if err := l.Held(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-w.done:
		t.Fatalf("the writer was done (%v) while it was held", err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if err := w.wait(t); err != nil {
		t.Fatal(err)
	}
	if got, err := l.Finish(t.Context()); err != nil || !bytes.Equal(got, w.stream) {
		t.Fatalf("got %d bytes, error %v", len(got), err)
	}
}

func TestReadThroughWithoutHold(t *testing.T) {
	for _, n := range []int{0, 1, 4096, streamBytes, pipeBytesAll + 1} {
		w, pipe := newWriter(t, n)
		l := start(t, Options{Pipe: pipe})
		w.begin()
		if err := w.wait(t); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Finish(t.Context()); err != nil || !bytes.Equal(got, w.stream) {
			t.Fatalf("%d bytes: got %d, error %v", n, len(got), err)
		}
	}
}

// TestLengthOtherThanKnown shows that a stream of another length is either held all the same or said not to have been: the boundary
// is where the pipe alone could have taken what was left.
func TestLengthOtherThanKnown(t *testing.T) {
	const pipeBytes = pipeBytesLong
	holdAt := streamBytes - restPipes*pipeBytes
	for _, c := range []struct {
		bytes int
		held  bool
	}{
		{1000, false}, {holdAt - 1, false}, {holdAt, false}, {holdAt + 1, false}, {holdAt + pipeBytes, false},
		{holdAt + pipeBytes + 1, true}, {streamBytes - 1, true}, {streamBytes + 1, true}, {2 * streamBytes, true},
	} {
		t.Run(strconv.Itoa(c.bytes), func(t *testing.T) {
			w, pipe := newWriter(t, c.bytes)
			l := start(t, Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: 5 * time.Second})
			w.begin()
			answered := make(chan struct{})
			go func() {
				w.done <- <-w.done // QEMU answers when it has written all
				close(answered)
			}()
			err := l.Held(t.Context(), answered)
			if err == nil {
				l.Release() //nolint:errcheck // Finish tells
				<-answered
				var got []byte
				if got, err = l.Finish(t.Context()); err == nil && !bytes.Equal(got, w.stream) {
					t.Fatal("the stream differs from what was written")
				}
			}
			if c.held && err != nil || !c.held && !errors.Is(err, ErrNotHeld) {
				t.Errorf("error %v, want held: %v", err, c.held)
			}
		})
	}
}

// TestHolderKilledOrStopped kills, stops and terminates the holder at each point of its life: the writer must come free each time, within
// the bound, and the worker must be told that the hold does not count.
func TestHolderKilledOrStopped(t *testing.T) {
	const bound = 300 * time.Millisecond
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP, unix.SIGTERM} {
		for _, point := range []string{"armed", "first byte", "held", "released"} {
			t.Run(fmt.Sprintf("%v/%s", unix.SignalName(sig), point), func(t *testing.T) {
				w, pipe := newWriter(t, streamBytes)
				l := start(t, Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: bound})
				hit := func(at string) {
					if at == point {
						if err := unix.Kill(l.PID(), sig); err != nil {
							t.Fatal(err)
						}
					}
				}
				hit("armed")
				w.begin()
				if point == "first byte" {
					time.Sleep(time.Duration(rand.Int64N(int64(time.Millisecond)))) // anywhere in the reading
				}
				hit("first byte")
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				err := l.Held(ctx, nil)
				begin := time.Now()
				if err == nil {
					hit("held")
					err = l.Release()
					hit("released")
				}
				wrote := w.wait(t)
				t.Logf("the writer came free after %v: %v", time.Since(begin), wrote)
				if err == nil {
					_, err = l.Finish(ctx)
				}
				// A signal may come after the stream was read to its end; then all is well.
				switch {
				case err != nil && !errors.Is(err, ErrLetGo):
					t.Errorf("error %v, want ErrLetGo", err)
				case err == nil && wrote != nil:
					t.Errorf("the hold counts, though the writer failed: %v", wrote)
				case wrote != nil && !errors.Is(wrote, unix.EPIPE):
					t.Errorf("the writer got %v, want EPIPE", wrote)
				}
			})
		}
	}
}

func TestHoldBound(t *testing.T) {
	w, pipe := newWriter(t, streamBytes)
	l := start(t, Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: 50 * time.Millisecond})
	w.begin()
	if err := l.Held(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := w.wait(t); !errors.Is(err, unix.EPIPE) {
		t.Errorf("held past its bound, the writer got %v, want EPIPE", err)
	}
	<-l.Gone()
	if err := l.Release(); !errors.Is(err, ErrLetGo) {
		if _, err = l.Finish(t.Context()); !errors.Is(err, ErrLetGo) {
			t.Errorf("error %v, want ErrLetGo", err)
		}
	}
}

func TestExtend(t *testing.T) {
	w, pipe := newWriter(t, streamBytes)
	l := start(t, Options{Pipe: pipe, StreamBytes: streamBytes, HoldBound: 300 * time.Millisecond})
	w.begin()
	if err := l.Held(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Extend(time.Minute); err != nil {
		t.Fatal(err)
	}
	select {
	case <-l.Gone():
		t.Fatal("the holder was killed at the bound that had been extended")
	case <-time.After(600 * time.Millisecond):
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if err := w.wait(t); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestOldBytesAreThrownAway leaves a piece of an earlier stream in the pipe, as a holder that was killed does.
func TestOldBytesAreThrownAway(t *testing.T) {
	w, pipe := newWriter(t, streamBytes)
	if _, err := w.pipe.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	l := start(t, Options{Pipe: pipe})
	w.begin()
	if err := w.wait(t); err != nil {
		t.Fatal(err)
	}
	if got, err := l.Finish(t.Context()); err != nil || !bytes.Equal(got, w.stream) {
		t.Fatalf("got %d bytes, error %v", len(got), err)
	}
}

func TestStreamTooLong(t *testing.T) {
	w, pipe := newWriter(t, streamBound+pipeBytesAll+1) // more than the pipe takes after the last read
	l := start(t, Options{Pipe: pipe})
	w.begin()
	if err := w.wait(t); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the writer got %v, want EPIPE", err)
	}
	if _, err := l.Finish(t.Context()); !errors.Is(err, ErrLetGo) {
		t.Errorf("error %v, want ErrLetGo", err)
	}
}

func TestStartRefusals(t *testing.T) {
	t.Run("no writer", func(t *testing.T) {
		w, pipe := newWriter(t, 0)
		w.pipe.Close()
		if l, err := Start(t.Context(), Options{Pipe: pipe}); err == nil {
			l.Close()
			t.Error("a leash on a pipe without a writer was started")
		}
	})
	t.Run("too short", func(t *testing.T) {
		_, pipe := newWriter(t, 0)
		if l, err := Start(t.Context(), Options{Pipe: pipe, StreamBytes: 100}); err == nil {
			l.Close()
			t.Error("a leash for a stream of 100 bytes was started")
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w, pipe := newWriter(t, streamBytes)
		if l, err := Start(ctx, Options{Pipe: pipe}); err == nil {
			l.Close()
			t.Error("a leash was started though cancelled")
		}
		w.begin()
		if err := w.wait(t); !errors.Is(err, unix.EPIPE) {
			t.Errorf("the writer got %v, want EPIPE", err)
		}
	})
}

// TestWorkerKilled kills the process that started the leash while the machine is held.
func TestWorkerKilled(t *testing.T) {
	w, pipe := newWriter(t, streamBytes)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), testRoleVariable+"=worker")
	cmd.ExtraFiles = []*os.File{pipe}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pipe.Close()
	defer cmd.Wait() //nolint:errcheck // it is killed
	buf := make([]byte, 16)
	if _, err := out.Read(buf); err != nil { // armed
		t.Fatal(err)
	}
	w.begin()
	if _, err := out.Read(buf); err != nil { // held
		t.Fatal(err)
	}
	begin := time.Now()
	cmd.Process.Kill() //nolint:errcheck // the test shows
	if err := w.wait(t); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the writer got %v, want EPIPE", err)
	}
	t.Logf("the writer came free %v after the worker was killed", time.Since(begin))
}

// runWorkerChild holds a leash on descriptor 3 until it is killed.
func runWorkerChild() {
	l, err := Start(context.Background(), Options{Pipe: os.NewFile(3, "pipe"), StreamBytes: streamBytes, HoldBound: time.Minute})
	if err == nil {
		os.Stdout.WriteString("armed\n")
		err = l.Held(context.Background(), nil)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Stdout.WriteString("held\n")
	select {}
}
