package faults

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/capture"
	"github.com/vmckpt/vmckpt/node-agent/qemu"
	"github.com/vmckpt/vmckpt/test/machine"
	"github.com/vmckpt/vmckpt/test/truth"
)

// refuses has a checkpoint refused, and looks that nothing of it has reached QEMU: no file of ours is open there, nobody stopped or started
// the machine.
func refuses(t *testing.T, b *truth.Bench) error {
	t.Helper()
	b.T = t
	look := func() (qemu.RunState, []string) {
		state, err := qemu.Status(t.Context(), b.Machine.Monitor)
		if err != nil {
			t.Fatal(err)
		}
		dir := fmt.Sprintf("/proc/%d/fd", b.Machine.PID)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var files []string
		for _, e := range entries {
			link, err := os.Readlink(filepath.Join(dir, e.Name()))
			if err != nil {
				continue // closed meanwhile
			}
			if link == "anon_inode:[userfaultfd]" || strings.HasPrefix(link, "pipe:") {
				files = append(files, e.Name()+" "+link)
			}
		}
		return state, files
	}
	events := b.Machine.Monitor.Subscribe("STOP", "RESUME")
	defer events.Close()
	state, files := look()
	_, err := capture.Run(t.Context(), b.Target, b.Repository, b.Options())
	t.Log(err)
	if err == nil {
		t.Error("it was not refused")
	}
	if now, left := look(); now != state || !slices.Equal(left, files) {
		t.Errorf("the machine was %q with %q open, and is %q with %q", state, files, now, left)
	}
	select {
	case e := <-events.C:
		t.Errorf("it was refused, and yet there is %+v", e)
	default:
	}
	wholeImages(t, b)
	if images, err := b.Repository.Images(t.Context()); err != nil || len(images) > 0 {
		t.Errorf("images %v, %v", images, err)
	}
	return err
}

// TestStates refuses a machine that neither runs nor was paused by its owner, and leaves it as it is.
func TestStates(t *testing.T) {
	action := func(of, what string) func(*testing.T, *machine.Machine) {
		return func(t *testing.T, m *machine.Machine) {
			if err := m.Monitor.Execute(t.Context(), "set-action", map[string]string{of: what}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		state  qemu.RunState
		change func(*machine.Options)
		bring  func(*testing.T, *machine.Machine) // the machine to it
	}{
		{qemu.StatePrelaunch, func(o *machine.Options) { o.Paused = true }, func(*testing.T, *machine.Machine) {}},
		{qemu.StateShutdown, func(*machine.Options) {}, func(t *testing.T, m *machine.Machine) {
			action("reboot", "shutdown")(t, m)
			if err := m.Monitor.Execute(t.Context(), "system_reset", nil, nil); err != nil {
				t.Fatal(err)
			}
		}},
		{qemu.StateGuestPanicked, func(o *machine.Options) { o.Args = []string{"-device", "pvpanic"} }, func(t *testing.T, m *machine.Machine) {
			action("panic", "pause")(t, m)
			// What the guest's driver does: docs/specs/pvpanic.rst of QEMU.
			if out, err := qemu.Human(t.Context(), m.Monitor, "o /b 0x505 1"); err != nil || out != "" {
				t.Fatalf("write to the port: %q, %v", out, err)
			}
		}},
		// The firmware reads the disk that it is to boot from.
		{qemu.StateIOError, func(o *machine.Options) {
			o.Paused, o.Accel = true, machine.TCG
			o.Args = []string{
				"-bios", "bios-256k.bin",
				"-blockdev", "driver=null-co,node-name=zeros,size=1048576,read-zeroes=on",
				"-blockdev", "driver=blkdebug,node-name=fails,image=zeros,inject-error.0.event=read_aio,inject-error.0.errno=5",
				"-blockdev", "driver=raw,node-name=broken,file=fails",
				"-device", "virtio-blk-pci,id=broken-disk,drive=broken,rerror=stop,bootindex=0,bus=pcie.0,addr=0x1c",
			}
		}, func(t *testing.T, m *machine.Machine) {
			if err := m.Continue(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(string(c.state), func(t *testing.T) {
			o := options()
			c.change(&o)
			b := truth.NewBench(t, o)
			c.bring(t, b.Machine)
			var now qemu.RunState
			if !within(20*time.Second, func() bool {
				var err error
				now, err = qemu.Status(t.Context(), b.Machine.Monitor)
				return err != nil || now == c.state
			}) || now != c.state {
				t.Fatalf("the machine is %q", now)
			}
			err := refuses(t, b)
			var refused *capture.StateError
			if !errors.Is(err, capture.ErrStopped) || !errors.As(err, &refused) || refused.State != c.state {
				t.Errorf("error %v, want that it is %q", err, c.state)
			}
		})
	}
}

// TestRefusals refuses machines that run and cannot be captured truly, and lets them go on.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		code   qemu.Code
		change func(*machine.Options)
		bring  func(*testing.T, *truth.Bench)
	}{
		{qemu.CodeMemoryDevice, func(o *machine.Options) {
			o.Args = []string{
				"-m", "maxmem=1G",
				"-object", "memory-backend-ram,id=more,size=128M",
				"-device", "virtio-mem-pci,id=virtio-mem,memdev=more,requested-size=0,bus=pcie.0,addr=0x1c",
			}
		}, func(*testing.T, *truth.Bench) {}},
		// QEMU has no way to save the state of such a disk, and says so.
		{qemu.CodeMigrationBlock, func(o *machine.Options) {
			o.Args = []string{
				"-blockdev", "driver=null-co,node-name=zeros,size=1048576,read-zeroes=on",
				"-device", "nvme,drive=zeros,serial=1,bus=pcie.0,addr=0x1c",
			}
		}, func(*testing.T, *truth.Bench) {}},
		{qemu.CodeSharedWriter, func(o *machine.Options) { o.Memory = machine.Memfd }, mapsMemory},
	} {
		t.Run(string(c.code), func(t *testing.T) {
			o := options()
			c.change(&o)
			b := truth.NewBench(t, o)
			c.bring(t, b)
			err := refuses(t, b)
			var refused *qemu.RefusedError
			if !errors.As(err, &refused) || len(refused.Reasons) != 1 || refused.Reasons[0].Code != c.code {
				t.Errorf("error %v, want one reason, %q", err, c.code)
			}
			goesOn(t, b.Machine)
		})
	}
}

// mapsMemory has another process map the machine's memory for writing until the test ends.
func mapsMemory(t *testing.T, b *truth.Bench) {
	t.Helper()
	layout, err := qemu.ReadLayout(t.Context(), b.Target.Monitor, b.Target.Process)
	if err != nil {
		t.Fatal(err)
	}
	dir := fmt.Sprintf("/proc/%d/map_files", b.Machine.PID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), fmt.Sprintf("%x-", layout[0].HVA)) })
	if i < 0 {
		t.Fatalf("no file is mapped where block %s begins", layout[0].Name)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), mappedVariable+"="+filepath.Join(dir, entries[i].Name()))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the process that maps memory: %v", err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "mapped\n" {
		t.Fatalf("the process that maps memory says %q, %v", line, err)
	}
}

// mappedVariable names a file for this process to map, in place of testing.
const mappedVariable = "VMCKPT_FAULTS_MAP"

// mapFile maps a file for writing and waits for the end of its standard input, if this process was started for that.
func mapFile() {
	path := os.Getenv(mappedVariable)
	if path == "" {
		return
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = unix.Mmap(int(file.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "map the memory of a machine:", err)
		os.Exit(1)
	}
	fmt.Println("mapped")
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // it is the end in any case
	os.Exit(0)
}
