package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
	"github.com/vmckpt/vmckpt/test/machine"
)

const (
	// workMiB is how much the guest writes between checkpoints, beside what it does anyway.
	workMiB = 10

	// apart is how many counts lie between two images at least, and between an image and the guest that is rolled back to it. It is
	// more than firstCounts, so that no count fits two images.
	apart = 8

	// firstCounts is how far behind the last count known before an image the first one printed after its restore may be: one, as it is
	// the next, and one more, as the first line may be lost: its beginning was printed before the restore.
	firstCounts = 2

	// following is how many counts in a row are looked at after a restore.
	following = 6
)

func main() {
	by := flag.String("by", "kubectl", "kubectl: through Kubernetes' API; vmckpt: the command line alone")
	bin := flag.String("bin", "bin", "the directory with the programs to show")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	d := &demo{ctx: ctx, begin: time.Now()}
	switch *by {
	case "kubectl":
		d.way = &cluster{demo: d}
	case "vmckpt":
		d.way = &commandLine{demo: d}
	default:
		fmt.Fprintf(os.Stderr, "demo: -by %s: want kubectl or vmckpt\n", *by)
		os.Exit(2)
	}
	err := d.run(*bin)
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

	way     way
	bin     string
	dir     string // repository, keys, records
	libvirt *machine.Libvirt
	guest   machine.Linux
	machine *machine.Machine
	since   int // number of the first line on the machine's serial console that the guest of now printed
	killed  []*machine.Machine

	images []*shot
	checks []*check
}

// way is how the commands of the story are given.
type way interface {
	// prepare makes ready what is needed, with the guest at work.
	prepare() error
	// capture takes a checkpoint and says what came of it.
	capture(name string) (captureResult, error)
	// list shows the images, and has the last one verified.
	list(last string) error
	// replaced says that another machine, fresh and paused, has taken the place of the one that was killed.
	replaced() error
	// restore puts an image into the machine, and lets it run.
	restore(image string, inPlace bool) error
	// close ends what was started.
	close() error
}

// shot is an image, and what the guest said right before and after it was taken.
type shot struct {
	name          string
	before, after workload.State
	result        captureResult
}

// captureResult is what the demo shows of a checkpoint: a part of what `vmckpt capture --output json` prints.
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

// check is one restore, and what the guest said after it.
type check struct {
	what        string
	image       *shot
	was         string        // where the machine was before
	at          uint64        // its count then; 0: it had not run
	took, until time.Duration // of the command; from its beginning until the guest counted on
	counts      []workload.State
	problem     error // what is wrong with that, if anything is
}

func (d *demo) run(bin string) (err error) {
	if d.bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "vmckpt-demo-"); err != nil {
		return err
	}
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
	if err := d.countedTo(1); err != nil {
		return err
	}
	if err := d.way.prepare(); err != nil {
		return err
	}

	for _, name := range []string{"base", "first", "second"} {
		if name != "base" {
			d.say("the guest writes %d MiB", workMiB)
			if err := d.ask(func(c *machine.Channel) error { return c.Work(d.ctx, workMiB) }); err != nil {
				return err
			}
			if err := d.countedTo(d.images[len(d.images)-1].after.Count + apart); err != nil {
				return err
			}
		}
		d.say("checkpoint %q, while the guest works", name)
		if err := d.capture(name); err != nil {
			return err
		}
	}
	if err := d.way.list("second"); err != nil {
		return err
	}

	base, first, second := d.images[0], d.images[1], d.images[2]
	if first.before.Count <= base.after.Count+firstCounts || second.before.Count <= first.after.Count+firstCounts {
		return errors.New("the images' counts overlap: what is restored could not be told apart")
	}

	for _, s := range []*shot{second, first} {
		d.say("the guest is killed; another QEMU, fresh and paused, takes its place and is given %q", s.name)
		twin := d.machine.Twin()
		if err := d.machine.Kill(); err != nil {
			return err
		}
		d.killed = append(d.killed, d.machine) // its directory has the disk
		if d.machine, err = d.libvirt.Launch(d.ctx, twin); err != nil {
			return err
		}
		if err := d.way.replaced(); err != nil {
			return err
		}
		if err := d.restore("restored", "not started", s, 0); err != nil {
			return err
		}
	}
	d.say("the guest works on, and is rolled back in place to %q", second.name)
	if err := d.ask(func(c *machine.Channel) error { return c.Work(d.ctx, workMiB) }); err != nil {
		return err
	}
	if err := d.countedTo(second.after.Count + firstCounts + apart); err != nil {
		return err
	}
	now, err := d.state()
	if err != nil {
		return err
	}
	fmt.Printf("    the guest is at count %d; %q was taken between %d and %d\n", now.Count, second.name, second.before.Count, second.after.Count)
	if err := d.restore("rolled back", fmt.Sprintf("at %d", now.Count), second, now.Count); err != nil {
		return err
	}
	d.table()
	var problems []error
	for _, c := range d.checks {
		problems = append(problems, c.problem)
	}
	return errors.Join(problems...)
}

func (d *demo) close() error {
	errs := []error{d.way.close()}
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

// countedTo waits until the guest has counted so far.
func (d *demo) countedTo(count uint64) error {
	ctx, cancel := context.WithTimeout(d.ctx, time.Minute)
	defer cancel()
	_, _, err := d.machine.Serial.WaitLine(ctx, d.since, func(line string) bool {
		s, ok := workload.ParseState(line)
		return ok && s.Count >= count
	})
	if err != nil {
		return fmt.Errorf("wait until the guest has counted to %d: %w", count, err)
	}
	return nil
}

func (d *demo) capture(name string) (err error) {
	s := &shot{name: name}
	if s.before, err = d.state(); err != nil {
		return err
	}
	if s.result, err = d.way.capture(name); err != nil {
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

// restore restores an image, lets the guest run, and looks at what it prints. A guest that is rolled back was at count at, else at 0. What is
// wrong with what it prints is noted with the check; the error is for what keeps the demo from going on.
func (d *demo) restore(what, was string, s *shot, at uint64) error {
	begin := time.Now()
	lines, err := d.machine.Serial.Lines()
	if err != nil {
		return err
	}
	d.since = len(lines)
	if err := d.way.restore(s.name, at != 0); err != nil {
		return err
	}
	c := &check{what: what, image: s, was: was, at: at, took: time.Since(begin)}
	d.checks = append(d.checks, c)
	c.problem = d.goesOn(c, begin)
	if c.problem == nil {
		_, c.problem = d.state() // on its channel it answers too
	}
	if c.problem != nil {
		c.problem = fmt.Errorf("%s, image %s: %w", what, s.name, c.problem)
		fmt.Printf("    WRONG: %v\n", c.problem)
		return nil
	}
	fmt.Printf("    the guest goes on: counts %d to %d, its buffer's hash right each time\n", c.counts[0].Count, c.counts[len(c.counts)-1].Count)
	return nil
}

// goesOn reads what the guest prints after a restore, and says what is wrong with it.
func (d *demo) goesOn(c *check, begin time.Time) error {
	ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
	defer cancel()
	from := d.since
	for len(c.counts) < following {
		// The guest checks its whole buffer at each count, and says so when a byte of it is wrong.
		line, n, err := d.machine.Serial.WaitLine(ctx, from, func(line string) bool {
			s, ok := workload.ParseState(line)
			if len(c.counts) == 0 && ok && c.at != 0 && s.Count >= c.at {
				return false // of before it was rolled back
			}
			return ok || strings.Contains(line, "CORRUPT")
		})
		if err != nil {
			return fmt.Errorf("the guest does not count on: %w", err)
		}
		from = n + 1
		s, ok := workload.ParseState(line)
		if !ok || !s.OK {
			return fmt.Errorf("the guest says: %s", line)
		}
		if want := d.guest.Counter().Hash(s.Count); s.Hash != want {
			return fmt.Errorf("the guest's buffer at count %d has hash %016x, and must have %016x", s.Count, s.Hash, want)
		}
		if len(c.counts) == 0 {
			d.since = n
			c.until = time.Since(begin)
			if least, most := c.image.before.Count, c.image.after.Count+firstCounts; s.Count < least || s.Count > most {
				return fmt.Errorf("the guest counts from %d; after the image's instant it is %d to %d", s.Count, least, most)
			}
		} else if last := c.counts[len(c.counts)-1].Count; s.Count != last+1 {
			return fmt.Errorf("the guest counts from %d to %d", last, s.Count)
		}
		c.counts = append(c.counts, s)
	}
	return nil
}

// table shows all of it at a glance.
func (d *demo) table() {
	d.say("what it took")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "image\tkind\tpages\tMiB on disk\ttime\tpause\tguest's count")
	for _, s := range d.images {
		fmt.Fprintf(w, "%s\t%s\t%d\t%.1f\t%v\t%v\t%d to %d\n", s.name, s.result.Kind, s.result.Pages.Written, float64(s.result.OwnBytes)/(1<<20),
			s.result.Duration.Round(time.Millisecond), s.result.Downtime.Round(10*time.Microsecond), s.before.Count, s.after.Count)
	}
	w.Flush()
	fmt.Println()
	fmt.Fprintln(w, "restore\timage\ttime\tuntil the guest counted on\tguest before\tguest's count\tbuffer")
	for _, c := range d.checks {
		counted, buffer := "?", "NOT SHOWN"
		if n := len(c.counts); n > 0 {
			counted = fmt.Sprintf("%d to %d", c.counts[0].Count, c.counts[n-1].Count)
		}
		if c.problem == nil {
			buffer = fmt.Sprintf("intact %d times", len(c.counts))
		}
		fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%s\t%s\t%s\n", c.what, c.image.name, c.took.Round(time.Millisecond), c.until.Round(time.Millisecond), c.was, counted, buffer)
	}
	w.Flush()
}
