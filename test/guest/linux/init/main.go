package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"golang.org/x/sys/unix"
)

// guest is what the loads share: the console, the settings of the kernel command line, and the counter's last state for the
// channel to answer with.
type guest struct {
	settings map[string]string
	counted  atomic.Pointer[workload.State]

	mu      sync.Mutex
	console *os.File
}

// printf prints a line on the serial console.
func (g *guest) printf(format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fmt.Fprintf(g.console, format+"\n", args...)
}

// number returns a setting of the command line.
func (g *guest) number(name string, otherwise uint64) uint64 {
	n, err := strconv.ParseUint(g.settings[name], 10, 63)
	if err != nil {
		return otherwise
	}
	return n
}

// watched runs a load. One that fails says so, and the guest goes on.
func (g *guest) watched(name string, load func() error) {
	defer func() {
		if trouble := recover(); trouble != nil {
			g.printf("init: %s: panic: %v\n%s", name, trouble, debug.Stack())
		}
	}()
	if err := load(); err != nil {
		g.printf("init: %s: %v", name, err)
	}
}

// load is one thing the guest works at. start makes it ready; run works for ever.
type load struct {
	name  string
	start func(*guest) (run func() error, err error)
}

func loads() []load {
	return []load{
		{"counter", startCounter},
		{"dma", startDMA},
		{"net", startNet},
		{"alloc", startAlloc},
		{"stress", startStress},
	}
}

func main() {
	g := &guest{console: os.Stdout}
	g.watched("start", g.start)
	select {} // the kernel panics when init ends
}

func (g *guest) start() error {
	for _, m := range []struct{ kind, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	console, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	g.console = console
	g.settings, err = readSettings()
	if err != nil {
		return err
	}
	if err := g.loadModules("/modules"); err != nil {
		return err
	}
	wanted := map[string]bool{}
	for name := range strings.SplitSeq(orDefault(g.settings["load"], "counter"), ",") {
		wanted[name] = true
	}
	for _, l := range loads() {
		if !wanted[l.name] {
			continue
		}
		run, err := l.start(g)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		go g.watched(l.name, run)
	}
	go g.watched("channel", g.serveChannel)
	g.printf("init: ready")
	return nil
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// readSettings returns what the kernel command line says in words that begin with "vmckpt.".
func readSettings() (map[string]string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	settings := map[string]string{}
	for word := range strings.FieldsSeq(string(line)) {
		if setting, ours := strings.CutPrefix(word, "vmckpt."); ours {
			name, value, _ := strings.Cut(setting, "=")
			settings[name] = value
		}
	}
	return settings, nil
}

// loadModules loads the modules that the file "order" in dir names, in its order.
func (g *guest) loadModules(dir string) error {
	order, err := os.ReadFile(dir + "/order")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(order)) {
		f, err := os.Open(dir + "/" + name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

// memory returns anonymous memory outside Go's heap, so that nothing but the load itself touches it.
func memory(bytes uint64) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", bytes, err)
	}
	return b, nil
}
