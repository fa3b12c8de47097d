package apiserver_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/apiserver"
)

// killedDir tells the test below that it is the process that is killed, and where its server may write.
const killedDir = "VMCKPT_TEST_KILLED_DIR"

func TestTheProgramsEndWithTheTestProcess(t *testing.T) {
	if dir := os.Getenv(killedDir); dir != "" {
		if _, err := apiserver.Start(dir); err != nil {
			t.Fatal(err)
		}
		fmt.Println("ready")
		select {}
	}
	if _, err := apiserver.FindPrograms(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	child.Env = append(os.Environ(), killedDir+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	killed := errors.Join(child.Process.Kill(), unwanted(child.Wait()))
	if line != "ready\n" || killed != nil {
		t.Fatalf("the process that is killed says %q (%v), and ends with %v", line, err, killed)
	}

	files, err := filepath.Glob(filepath.Join(dir, "*.pid"))
	if err != nil || len(files) != 2 {
		t.Fatalf("the files of process ids are %q, want two (%v)", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("process %d of %s is there (%v)", pid, filepath.Base(file), err)
			}
			return nil
		})
	}
}

// unwanted returns nil for the end of a process that was killed, which is what was wanted.
func unwanted(end error) error {
	if exit := (*exec.ExitError)(nil); errors.As(end, &exit) && exit.String() == "signal: killed" {
		return nil
	}
	return fmt.Errorf("it ended with %v, want that it was killed", end)
}
