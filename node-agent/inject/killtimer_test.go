package inject

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childKillTimer is the child that waits for its timer.
const childKillTimer = "killtimer"

// TestKillTimerEndsAStoppedProcess shows what the helper and the leash rely on: the kernel's timer kills a process that cannot run.
func TestKillTimerEndsAStoppedProcess(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMark+"="+childKillTimer)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil { // the timer runs
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	state, err := cmd.Process.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if ws := state.Sys().(interface{ Signaled() bool }); !ws.Signaled() {
		t.Fatalf("the stopped process ended as %v, want killed", state)
	}
	t.Logf("killed %v after it was stopped", time.Since(begin))
}

// killTimerMain sets its timer, takes that back, sets it again, and waits for its end.
func killTimerMain() {
	timer, err := NewKillTimer()
	for _, d := range []time.Duration{20 * time.Millisecond, 0, 300 * time.Millisecond} {
		if err == nil {
			err = timer.Set(d)
		}
		if d == 0 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Stdout.WriteString("running\n")
	select {}
}
