package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// vmFlags are the flags that say which machine is meant and how to reach its monitor.
type vmFlags struct {
	guest, uuid      string
	pid              int
	monitor, libvirt string
}

// selectorFlags adds the flags that say which machine is meant.
func (f *vmFlags) selectorFlags(c *cobra.Command) {
	c.Flags().StringVar(&f.guest, "guest", "", "`NAME` of the machine (QEMU's -name guest=); the same as the argument VM")
	c.Flags().StringVar(&f.uuid, "uuid", "", "`UUID` of the machine")
	c.Flags().IntVar(&f.pid, "pid", 0, "`PID` of the machine's QEMU process")
	completeFlag(c, "guest", machineNames)
	completeFlag(c, "pid", machinePIDs)
}

// monitorFlags adds the flags that say how to reach the monitor.
func (f *vmFlags) monitorFlags(c *cobra.Command) {
	c.Flags().StringVar(&f.monitor, "monitor", "", "`PATH` of the machine's QMP socket (default: found from its process)")
	c.Flags().StringVar(&f.libvirt, "libvirt", "", "`PATH` of the socket, or URI, of the libvirt that runs the machine (default: found from its process)")
}

var uuidPattern = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// vm returns what the flags and the argument, empty where there is none, say of the machine.
func (f *vmFlags) vm(argument string, getenv func(string) string) (jobs.VM, error) {
	if argument != "" && f.guest != "" && argument != f.guest {
		return jobs.VM{}, &usageError{fmt.Errorf("two machines are named: %q and --guest %q", argument, f.guest)}
	}
	v := jobs.VM{Guest: f.guest, UUID: f.uuid, PID: f.pid, QMPSocket: f.monitor}
	if argument != "" {
		v.Guest = argument
	}
	if v.Guest == "" && v.UUID == "" && v.PID == 0 {
		return jobs.VM{}, &usageError{errors.New("which machine? Name it by its guest name, --uuid or --pid")}
	}
	if v.PID < 0 {
		return jobs.VM{}, &usageError{fmt.Errorf("--pid %d: want the number of a process", v.PID)}
	}
	if v.UUID != "" && !uuidPattern.MatchString(v.UUID) {
		return jobs.VM{}, &usageError{fmt.Errorf("--uuid %s: want a UUID such as 01234567-89ab-cdef-0123-456789abcdef", v.UUID)}
	}
	if f.monitor != "" && f.libvirt != "" {
		return jobs.VM{}, &usageError{errors.New("two ways to the monitor are named: --monitor and --libvirt")}
	}
	if f.libvirt != "" {
		socket, err := libvirtSocket(f.libvirt, getenv)
		if err != nil {
			return jobs.VM{}, &adviceError{&usageError{fmt.Errorf("--libvirt %s: %w", f.libvirt, err)}, "name the socket of the libvirt that runs the machine, or leave --libvirt out: it is found from the process"}
		}
		v.LibvirtSocket = socket
	}
	return v, nil
}

// libvirtSocket returns the socket behind a URI of libvirt's; a path is returned as it is. Only a libvirt of this host will do.
func libvirtSocket(from string, getenv func(string) string) (string, error) {
	if !strings.Contains(from, ":") {
		return from, nil
	}
	u, err := url.Parse(from)
	if err != nil {
		return "", err
	}
	if u.Host != "" || u.Scheme != "qemu" && u.Scheme != "qemu+unix" {
		return "", errors.New("want qemu:///system, qemu:///session or a socket's path: the machine has to run on this host")
	}
	if socket := u.Query().Get("socket"); socket != "" {
		return socket, nil
	}
	var dir string
	switch u.Path {
	case "/system":
		dir = "/run/libvirt"
	case "/session":
		run := getenv("XDG_RUNTIME_DIR")
		if run == "" {
			return "", errors.New("XDG_RUNTIME_DIR is not set; name the socket's path")
		}
		dir = filepath.Join(run, "libvirt")
	default:
		return "", fmt.Errorf("unknown driver path %q", u.Path)
	}
	// The modular daemon first, then the old one.
	candidates := []string{filepath.Join(dir, "virtqemud-sock"), filepath.Join(dir, "libvirt-sock")}
	for _, socket := range candidates {
		if _, err := os.Stat(socket); err == nil {
			return socket, nil
		}
	}
	return "", fmt.Errorf("no libvirt listens: none of %s is there", strings.Join(candidates, ", "))
}
