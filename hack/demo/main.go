package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/machine"
)

// workMiB is how much the guest writes between checkpoints, beside what it does anyway.
const workMiB = 10

func main() {
	binary := flag.String("vmckpt", "bin/vmckpt", "the vmckpt to show")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	d := &demo{ctx: ctx, begin: time.Now()}
	err := d.run(*binary)
	if err := d.close(); err != nil {
		fmt.Fprintln(os.Stderr, "demo: clean up:", err)
	}
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; what it had started is ended and removed")
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		fmt.Printf("\nNOT ALL HELD, after %v\n", time.Since(d.begin).Round(time.Second))
		os.Exit(1)
	}
	fmt.Printf("\nALL HELD: the guest went on from the right count with its memory intact, each time (%v)\n", time.Since(d.begin).Round(time.Second))
}

type demo struct {
	ctx   context.Context
	begin time.Time

	binary  string
	dir     string // repository, keys, records
	env     []string
	libvirt *machine.Libvirt
	guest   machine.Linux
	machine *machine.Machine
	killed  []*machine.Machine

	images []*shot
	checks []check
}

// shot is an image, and what the guest said right before and after it was taken.
type shot struct {
	name          string
	before, after workload.State
	result        captureResult
}

// captureResult is what the demo reads of `vmckpt capture --output json`.
type captureResult struct {
	Kind     string        `json:"kind"`
	Duration time.Duration `json:"duration"`
	Downtime time.Duration `json:"downtime"`
	OwnBytes int64         `json:"ownBytes"`
	Pauses   []struct {
		For   string        `json:"for"`
		Total time.Duration `json:"total"`
		Parts []struct {
			Name     string        `json:"name"`
			Duration time.Duration `json:"duration"`
		} `json:"parts"`
	} `json:"pauses"`
	Pages struct {
		Written uint64 `json:"written"`
	} `json:"pages"`
}

// check is one time that the guest was asked whether it is where it was.
type check struct {
	what        string
	image       string
	count       uint64
	took, until time.Duration // of the command; from its beginning until the guest answered
}

func (d *demo) run(binary string) (err error) {
	if d.binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "vmckpt-demo-"); err != nil {
		return err
	}
	d.env = append(os.Environ(), "VMCKPT_REPO="+filepath.Join(d.dir, "repository"), "VMCKPT_KEY="+filepath.Join(d.dir, "key"))

	d.say("Debian's cloud kernel boots, 1 GiB, in a QEMU that libvirt runs (TCG)")
	if d.libvirt, err = machine.LaunchLibvirt(d.ctx); err != nil {
		return err
	}
	d.guest = machine.Linux{BufferMiB: 64}
	version := machine.V72 // Debian 12's; Debian 13 has the other
	if _, err := machine.FindQEMU(d.ctx, version); err != nil {
		version = machine.V10
	}
	options := machine.Options{Name: "demo_web", QEMU: version, MemoryBytes: machine.GiB, Guest: d.guest, Balloon: true, FreePageReporting: true, Disk: &machine.Disk{}}
	if d.machine, err = d.libvirt.Launch(d.ctx, options); err != nil {
		return err
	}
	if err := d.counting(); err != nil {
		return err
	}
	if err := d.vmckpt(nil, "init"); err != nil {
		return err
	}

	for _, name := range []string{"base", "first", "second"} {
		if name != "base" {
			d.say("the guest writes %d MiB", workMiB)
			if err := d.ask(func(c *machine.Channel) error { return c.Work(d.ctx, workMiB) }); err != nil {
				return err
			}
		}
		d.say("checkpoint %q, while the guest works", name)
		if err := d.capture(name); err != nil {
			return err
		}
	}
	if err := d.vmckpt(nil, "list"); err != nil {
		return err
	}
	if err := d.vmckpt(nil, "verify", "second"); err != nil {
		return err
	}

	for _, s := range []*shot{d.images[2], d.images[1]} {
		d.say("the guest is killed; another QEMU, fresh and paused, takes its place and is given %q", s.name)
		twin := d.machine.Twin()
		if err := d.machine.Kill(); err != nil {
			return err
		}
		d.killed = append(d.killed, d.machine) // its directory has the disk
		if d.machine, err = d.libvirt.Launch(d.ctx, twin); err != nil {
			return err
		}
		if err := d.restore("restored", s, "restore", s.name, "demo_web", "--run", "--record-dir", d.dir); err != nil {
			return err
		}
	}
	d.say("the guest works on, and is rolled back in place to %q", d.images[2].name)
	if err := d.ask(func(c *machine.Channel) error { return c.Work(d.ctx, workMiB) }); err != nil {
		return err
	}
	if err := d.restore("rolled back", d.images[2], "restore", d.images[2].name, "demo_web", "--in-place", "--run", "--full-compare", "--record-dir", d.dir); err != nil {
		return err
	}
	d.table()
	return nil
}

func (d *demo) close() error {
	var errs []error
	for _, m := range append(d.killed, d.machine) {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if d.libvirt != nil {
		errs = append(errs, d.libvirt.Close())
	}
	if d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}

// say tells what comes next.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("\n[%4.1fs] %s\n", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

// vmckpt runs a command as a user would. With result, its answer is asked for as JSON and put there.
func (d *demo) vmckpt(result any, args ...string) error {
	fmt.Printf("  $ vmckpt %s\n", strings.Join(args, " "))
	if result != nil {
		args = append(args, "--output", "json")
	}
	var answer bytes.Buffer
	cmd := exec.CommandContext(d.ctx, d.binary, args...)
	cmd.Env = d.env
	cmd.Stdout, cmd.Stderr = &answer, os.Stderr
	// An interrupt at the terminal comes to it by us, once: a second one would end its worker at once.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	err := cmd.Run()
	if result == nil {
		io.WriteString(os.Stdout, "    "+strings.ReplaceAll(strings.TrimRight(answer.String(), "\n"), "\n", "\n    ")+"\n")
	}
	if err != nil {
		return fmt.Errorf("vmckpt %s: %w", strings.Join(args, " "), err)
	}
	if result != nil {
		if err := json.Unmarshal(answer.Bytes(), result); err != nil {
			return fmt.Errorf("the answer of vmckpt %s: %w", args[0], err)
		}
	}
	return nil
}

// ask speaks with the guest over its channel.
func (d *demo) ask(f func(*machine.Channel) error) error {
	channel, err := d.machine.DialChannel(d.ctx)
	if err != nil {
		return err
	}
	defer channel.Close()
	return f(channel)
}

// state asks the guest where it is, and whether its buffer is what it must be there.
func (d *demo) state() (workload.State, error) {
	ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
	defer cancel()
	var s workload.State
	err := d.ask(func(c *machine.Channel) (err error) {
		s, err = c.State(ctx)
		return err
	})
	if err != nil {
		return s, err
	}
	if want := d.guest.Counter().Hash(s.Count); s.Hash != want {
		return s, fmt.Errorf("the guest's buffer at count %d has hash %016x, and must have %016x", s.Count, s.Hash, want)
	}
	return s, nil
}

// counting waits until the guest has filled its buffer and counts.
func (d *demo) counting() error {
	ctx, cancel := context.WithTimeout(d.ctx, time.Minute)
	defer cancel()
	_, _, err := d.machine.Serial.WaitLine(ctx, 0, func(line string) bool {
		_, ok := workload.ParseState(line)
		return ok
	})
	return err
}

func (d *demo) capture(name string) (err error) {
	s := &shot{name: name}
	if s.before, err = d.state(); err != nil {
		return err
	}
	if err := d.vmckpt(&s.result, "capture", "demo_web", "--name", name, "--record-dir", d.dir); err != nil {
		return err
	}
	if s.after, err = d.state(); err != nil {
		return err
	}
	fmt.Printf("    %s, %d pages, %.1f MiB on disk, in %v; the guest stood still for %v, and counted from %d to %d\n", s.result.Kind, s.result.Pages.Written,
		float64(s.result.OwnBytes)/(1<<20), s.result.Duration.Round(time.Millisecond), s.result.Downtime.Round(10*time.Microsecond), s.before.Count, s.after.Count)
	for _, p := range s.result.Pauses {
		var parts []string
		for _, part := range p.Parts {
			parts = append(parts, fmt.Sprintf("%s %v", part.Name, part.Duration.Round(10*time.Microsecond)))
		}
		fmt.Printf("    pause for the %s, %v: %s\n", p.For, p.Total.Round(10*time.Microsecond), strings.Join(parts, ", "))
	}
	d.images = append(d.images, s)
	return nil
}

// restoreGrace is how many counts a guest may be ahead of its image when it is first asked, having run meanwhile.
const restoreGrace = 100

func (d *demo) restore(what string, s *shot, args ...string) error {
	begin := time.Now()
	if err := d.vmckpt(nil, args...); err != nil {
		return err
	}
	took := time.Since(begin)
	first, err := d.state()
	if err != nil {
		return err
	}
	until := time.Since(begin)
	if first.Count < s.before.Count || first.Count > s.after.Count+restoreGrace {
		return fmt.Errorf("the guest counts from %d; image %s was taken between %d and %d", first.Count, s.name, s.before.Count, s.after.Count)
	}
	for next := first; next.Count < first.Count+3; {
		if next, err = d.state(); err != nil {
			return err
		}
	}
	// The guest checks its whole buffer at each count, and says so when a byte of it is wrong.
	lines, err := d.machine.Serial.Lines()
	if err != nil {
		return err
	}
	for _, line := range lines {
		if strings.Contains(line, "CORRUPT") {
			return fmt.Errorf("the guest says: %s", line)
		}
	}
	fmt.Printf("    the guest goes on: count %d, its buffer's hash is right\n", first.Count)
	d.checks = append(d.checks, check{what: what, image: s.name, count: first.Count, took: took, until: until})
	return nil
}

// table shows all of it at a glance.
func (d *demo) table() {
	d.say("what it took")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "image\tkind\tpages\tMiB on disk\ttime\tpause\tguest's count\t")
	for _, s := range d.images {
		fmt.Fprintf(w, "%s\t%s\t%d\t%.1f\t%v\t%v\t%d to %d\t\n", s.name, s.result.Kind, s.result.Pages.Written, float64(s.result.OwnBytes)/(1<<20),
			s.result.Duration.Round(time.Millisecond), s.result.Downtime.Round(10*time.Microsecond), s.before.Count, s.after.Count)
	}
	w.Flush()
	fmt.Println()
	fmt.Fprintln(w, "restore\timage\ttime\tuntil the guest answered\tguest's count\tbuffer\t")
	for _, c := range d.checks {
		fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%d\tintact\t\n", c.what, c.image, c.took.Round(time.Millisecond), c.until.Round(time.Millisecond), c.count)
	}
	w.Flush()
}
