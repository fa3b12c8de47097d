package inject

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// monitorThreadName is what QEMU calls the thread that its monitors read and write in, where it names threads (-name debug-threads=on, as
// libvirt has it): "IO " and the name of the I/O thread, monitor/monitor.c.
const monitorThreadName = "IO mon_iothread"

// MonitorThread finds the thread of a QEMU process in which its monitors' sockets are served. It waits in poll or ppoll, without any of QEMU's
// locks, also while the main thread is busy with a command: the place for calls that are to be made while the machine is held.
//
// Its name alone is not believed, and there may be none: it has to wait in a poll, and without a name it is the one thread beside the main one
// whose poll has a Unix socket in it. [ErrBusy] where there is no such thread, or more than one.
func MonitorThread(pid int) (tid int, err error) {
	// It may just be at work for somebody, and waits again in a moment.
	for until := time.Now().Add(threadBound); ; time.Sleep(threadPause) {
		tid, err = lookForMonitorThread(pid)
		if !errors.Is(err, ErrBusy) || time.Now().After(until) {
			return tid, err
		}
	}
}

const (
	threadBound = time.Second
	threadPause = time.Millisecond
)

func lookForMonitorThread(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return 0, gone(err)
	}
	var named, polling []int
	sockets, err := unixSockets(pid)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == pid {
			continue
		}
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/comm", pid, tid))
		if err != nil {
			continue // ended
		}
		call, err := readCall(pid, tid)
		if err != nil || call == nil || !call.parked(pid) {
			continue
		}
		if strings.TrimSuffix(string(name), "\n") == monitorThreadName {
			named = append(named, tid)
		}
		if pollsOne(pid, call, sockets) {
			polling = append(polling, tid)
		}
	}
	switch {
	case len(named) == 1:
		return named[0], nil
	case len(named) == 0 && len(polling) == 1:
		return polling[0], nil
	}
	return 0, fmt.Errorf("find the monitor's thread of process %d: %w: %d threads have its name, and %d wait for a Unix socket", pid, ErrBusy, len(named), len(polling))
}

// mostPolled bounds how many descriptors of a poll are looked at: a monitor's thread has one or two for each monitor.
const mostPolled = 256

// pollsOne says whether a poll waits for one of the sockets. Its first two arguments are an array of struct pollfd (int fd; short events,
// revents) and that one's length.
func pollsOne(pid int, call *sleepingCall, sockets map[string]bool) bool {
	const pollfdBytes = 8
	n := min(call.arguments[1], mostPolled)
	if n == 0 {
		return false
	}
	polled := make([]byte, n*pollfdBytes)
	if peek(pid, call.arguments[0], polled) != nil {
		return false
	}
	for at := 0; at < len(polled); at += pollfdBytes {
		fd := int32(binary.LittleEndian.Uint32(polled[at:]))
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil && sockets[link] {
			return true
		}
	}
	return false
}

// unixSockets lists the Unix sockets of the process's network namespace, by the link of a descriptor for them: "socket:[INODE]".
func unixSockets(pid int) (map[string]bool, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		return nil, gone(err)
	}
	defer f.Close()
	sockets := map[string]bool{}
	const inodeField = 6 // Num RefCount Protocol Flags Type St Inode Path; net/unix/af_unix.c, unix_seq_show
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > inodeField {
			sockets["socket:["+fields[inodeField]+"]"] = true
		}
	}
	return sockets, nil
}
