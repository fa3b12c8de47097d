package faults

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// children lists the processes that a process has started and that have not been waited for.
func children(pid int) ([]int, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	if len(lists) == 0 {
		return nil, fmt.Errorf("process %d has no list of its children: it is gone, or the kernel has none (CONFIG_PROC_CHILDREN)", pid)
	}
	var pids []int
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for word := range strings.FieldsSeq(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", list, err)
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}

// holder finds the process that holds the leash, a child of pid.
func holder(pid int) (int, error) { return helper(pid, "vmckpt-leash") }

// keeper finds the process that keeps a guard, a child of pid.
func keeper(pid int) (int, error) { return helper(pid, "vmckpt-guard") }

// helper finds the child of pid whose whole command line is name.
func helper(pid int, name string) (int, error) {
	pids, err := children(pid)
	if err != nil {
		return 0, err
	}
	for _, child := range pids {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child))
		if err == nil && string(line) == name+"\x00" {
			return child, nil
		}
	}
	return 0, fmt.Errorf("none of the children %v of process %d is %s", pids, pid, name)
}

// state is the letter that the kernel has for what a process does (proc(5), stat): 'T' is stopped, 'Z' has ended; 0 where there is none.
func state(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	if _, after, found := strings.Cut(string(text), ") "); found && after != "" {
		return after[0]
	}
	return 0
}

// ended says whether a process is no more, waited for or not.
func ended(pid int) bool {
	s := state(pid)
	return s == 0 || s == 'Z' || s == 'X'
}

// within waits until something is so.
func within(bound time.Duration, so func() bool) bool {
	for end := time.Now().Add(bound); ; time.Sleep(200 * time.Microsecond) {
		if so() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// family is a worker with all that it has started, and what ends them together, as the end of a container does.
type family interface {
	fmt.Stringer
	join() string     // the file that a process writes its number to, to be in it with all it will start; "" where it needs not
	members() []int   // that have not ended
	kill() error      // all, at one blow
	begin(worker int) // tells who the first one is
	close(testing.TB) // when all have ended
}

// newFamily returns the best kind of family that can be had here.
func newFamily(t testing.TB) family {
	t.Helper()
	for _, kind := range families {
		f, err := kind.make()
		if err != nil {
			t.Logf("%s: %v", kind.name, err)
			continue
		}
		t.Cleanup(func() { f.close(t) })
		t.Logf("a worker dies with its family by %v", f)
		return f
	}
	panic("there is always the family by descent")
}

var families = []struct {
	name string
	make func() (family, error)
}{
	{"cgroup v2", func() (family, error) { return makeCgroup("cgroup2", "", "cgroup.kill") }},
	{"cgroup v1 freezer", func() (family, error) { return makeCgroup("cgroup", "freezer", "freezer.state") }},
	{"descent", func() (family, error) { return &descent{}, nil }},
}

// cgroup is a family that is a control group (cgroups(7)).
type cgroup struct {
	dir string
	by  string // the file that ends it: cgroup.kill, or freezer.state of the old hierarchy
}

// makeCgroup makes a group beneath the one of this process, in the hierarchy of that type and controller.
func makeCgroup(fstype, controller, by string) (family, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	root := ""
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 3 && f[2] == fstype && (controller == "" || slices.Contains(strings.Split(f[3], ","), controller)) {
			root = f[1]
		}
	}
	if root == "" {
		return nil, errors.New("that hierarchy is not mounted")
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	path, found := "", false
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && slices.Contains(strings.Split(f[1], ","), controller) {
			path, found = f[2], true
		}
	}
	if !found {
		return nil, errors.New("this process is in no group of it")
	}
	dir, err := os.MkdirTemp(filepath.Join(root, path), "vmckpt-faults-")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, by)); err != nil {
		return nil, errors.Join(err, os.Remove(dir)) // Linux before 5.14
	}
	return &cgroup{dir, by}, nil
}

func (c *cgroup) String() string { return c.by + " of a control group" }

func (c *cgroup) join() string { return filepath.Join(c.dir, "cgroup.procs") }

func (c *cgroup) begin(int) {}

func (c *cgroup) members() []int {
	text, err := os.ReadFile(c.join())
	if err != nil {
		return nil
	}
	var pids []int
	for word := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(word); err == nil && !ended(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (c *cgroup) kill() error {
	if c.by == "cgroup.kill" {
		return os.WriteFile(filepath.Join(c.dir, c.by), []byte("1"), 0)
	}
	set := func(state string) error {
		return os.WriteFile(filepath.Join(c.dir, c.by), []byte(state), 0)
	}
	// Frozen, nobody starts another one while they are killed; the signals come through as they thaw.
	if err := set("FROZEN"); err != nil {
		return err
	}
	frozen := within(5*time.Second, func() bool {
		text, err := os.ReadFile(filepath.Join(c.dir, c.by))
		return err == nil && strings.TrimSpace(string(text)) == "FROZEN"
	})
	for _, pid := range c.members() {
		unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // members shows
	}
	if err := set("THAWED"); err != nil {
		return err
	}
	if !frozen {
		return errors.New("the group does not freeze")
	}
	return nil
}

func (c *cgroup) close(t testing.TB) {
	if !within(5*time.Second, func() bool { return os.Remove(c.dir) == nil }) {
		t.Errorf("the control group %s cannot be removed; in it are %v", c.dir, c.members())
	}
}

// descent is a family where there are no control groups: a process and its descendants. Each is stopped before its children are looked
// for, so that it starts no more.
type descent struct{ worker int }

func (d *descent) String() string { return "killing each of its descendants" }

func (d *descent) join() string { return "" }

func (d *descent) begin(worker int) { d.worker = worker }

func (d *descent) members() []int {
	var pids []int
	d.walk(func(pid int) { pids = append(pids, pid) })
	return pids
}

func (d *descent) walk(visit func(pid int)) {
	var all func(pid int)
	all = func(pid int) {
		if pid == 0 || ended(pid) {
			return
		}
		visit(pid)
		pids, err := children(pid)
		if err != nil {
			return // it has ended; what it left behind is another's child now
		}
		for _, child := range pids {
			all(child)
		}
	}
	all(d.worker)
}

func (d *descent) kill() error {
	if _, err := children(os.Getpid()); err != nil {
		return err
	}
	var pids []int
	d.walk(func(pid int) {
		unix.Kill(pid, unix.SIGSTOP) //nolint:errcheck // it may have ended
		within(time.Second, func() bool { return state(pid) == 'T' || ended(pid) })
		pids = append(pids, pid)
	})
	for _, pid := range pids {
		unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may have ended
	}
	return nil
}

func (d *descent) close(testing.TB) {}

// TestFamilies: each kind of family that can be had here ends grandchildren too.
func TestFamilies(t *testing.T) {
	for _, kind := range families {
		t.Run(kind.name, func(t *testing.T) {
			f, err := kind.make()
			if err != nil {
				t.Skipf("no family by %s: %v", kind.name, err)
			}
			defer f.close(t)
			script := "(sleep 60 & wait) & sleep 60 & wait"
			if f.join() != "" {
				script = "echo $$ >" + f.join() + "; " + script
			}
			cmd := exec.Command("sh", "-c", script)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			waited := make(chan struct{})
			go func() {
				defer close(waited)
				cmd.Wait() //nolint:errcheck // it is killed
			}()
			f.begin(cmd.Process.Pid)
			if !within(5*time.Second, func() bool { return len(f.members()) == 4 }) {
				t.Errorf("its members are %v, want the shell, another one and two sleeps", f.members())
			}
			members := f.members()
			if err := f.kill(); err != nil {
				t.Error(err)
			}
			<-waited
			for _, pid := range members {
				if !within(5*time.Second, func() bool { return ended(pid) }) {
					t.Errorf("process %d has outlived its family", pid)
				}
			}
		})
	}
}
