package inject

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	qemu "github.com/vmckpt/vmckpt/test/machine"
)

// forEachQEMU runs f on each version of QEMU that is there.
func forEachQEMU(t *testing.T, f func(t *testing.T, binary string)) {
	needRoot(t)
	for _, v := range []qemu.Version{qemu.V72, qemu.V10} {
		t.Run(string(v), func(t *testing.T) {
			binary, err := qemu.FindQEMU(t.Context(), v)
			if err != nil {
				t.Skip(err)
			}
			f(t, binary)
		})
	}
}

// ticker is the boot sector of a guest that does nothing but write to QEMU's debug console, on and on, with a pause between.
func ticker() []byte {
	sector := make([]byte, 512)
	copy(sector, []byte{
		0xba, 0x02, 0x04, //       mov dx, 0x402
		0xb0, '.', //        next: mov al, '.'
		0xee,             //       out dx, al
		0xb9, 0x00, 0x40, //       mov cx, 0x4000
		0xe2, 0xfe, //       wait: loop wait
		0xeb, 0xf6, //             jmp next
	})
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

// machine is a running QEMU with that guest.
type machine struct {
	t       testing.TB
	cmd     *exec.Cmd
	console string
	monitor net.Conn
	answers *bufio.Reader
	said    *bytes.Buffer
}

func startMachine(t testing.TB, binary string) *machine {
	t.Helper()
	dir := t.TempDir()
	disk, socket, console := filepath.Join(dir, "disk"), filepath.Join(dir, "monitor"), filepath.Join(dir, "console")
	if err := os.WriteFile(disk, ticker(), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, console: console, said: &bytes.Buffer{}}
	m.cmd = exec.Command(binary, // with the sandbox that libvirt puts it into
		"-accel", "tcg", "-cpu", "qemu64", "-m", "64", "-nodefaults", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-drive", "file="+disk+",format=raw,if=ide",
		"-chardev", "file,id=console,path="+console, "-device", "isa-debugcon,chardev=console,iobase=0x402",
		"-qmp", "unix:"+socket+",server=on,wait=off")
	m.cmd.Stdout, m.cmd.Stderr = m.said, m.said
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	})
	var err error
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if m.monitor, err = net.Dial("unix", socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("QEMU's monitor: %v; it said: %s", err, m.said)
		}
	}
	t.Cleanup(func() { _ = m.monitor.Close() })
	m.answers = bufio.NewReader(m.monitor)
	m.execute("qmp_capabilities")
	for range 2 { // firmware first, then the guest: it is up when its output has not ended
		m.mustTick()
	}
	return m
}

func (m *machine) pid() int { return m.cmd.Process.Pid }

// execute sends a command without arguments and returns its result.
func (m *machine) execute(command string) map[string]any {
	m.t.Helper()
	_ = m.monitor.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := m.monitor.Write([]byte(`{"execute":"` + command + `"}` + "\n")); err != nil {
		m.t.Fatalf("%s: %v; QEMU said: %s", command, err, m.said)
	}
	for {
		line, err := m.answers.ReadBytes('\n')
		if err != nil {
			m.t.Fatalf("%s: %v; QEMU said: %s", command, err, m.said)
		}
		var answer struct {
			Return map[string]any
			Error  any
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			m.t.Fatal(err)
		}
		switch {
		case answer.Error != nil:
			m.t.Fatalf("%s: %v", command, answer.Error)
		case answer.Return != nil:
			return answer.Return
		}
	}
}

// mustTick fails the test unless the guest writes on.
func (m *machine) mustTick() {
	m.t.Helper()
	size := func() int64 {
		info, err := os.Stat(m.console)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	before := size()
	for deadline := time.Now().Add(20 * time.Second); size() <= before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("the guest has stopped after %d bytes; QEMU said: %s", before, m.said)
		}
	}
}

// mustGoOn fails the test unless monitor and guest both do.
func (m *machine) mustGoOn() {
	m.t.Helper()
	if status := m.execute("query-status"); status["status"] != "running" {
		m.t.Fatalf("status %v; QEMU said: %s", status, m.said)
	}
	m.mustTick()
}

func TestMachineManyTimes(t *testing.T) { forEachQEMU(t, manyTimes) }

func manyTimes(t *testing.T, binary string) {
	m := startMachine(t, binary)
	var stops []time.Duration
	for range 100 {
		report, err := Do(shortly(t), m.pid(), everything())
		if err != nil {
			t.Fatal(err)
		}
		stops = append(stops, report.Stop)
		var undo Program
		for _, f := range report.Files {
			undo = append(undo, Close(f))
		}
		if _, err := Do(shortly(t), m.pid(), undo); err != nil {
			t.Fatal(err)
		}
		m.execute("query-status")
	}
	m.mustGoOn()
	if m.said.Len() > 0 {
		t.Errorf("QEMU said: %s", m.said)
	}
	t.Logf("stops of %v: median %v, longest %v", everything(), median(stops), stops[len(stops)-1])
}

// TestMachineHelperDiesAnywhere kills the helper at every step, with QEMU's own sandbox on: it is in force again as soon
// as the helper is dead.
func TestMachineHelperDiesAnywhere(t *testing.T) { forEachQEMU(t, helperDiesAnywhere) }

func helperDiesAnywhere(t *testing.T, binary string) {
	m := startMachine(t, binary)
	answer, err := runHelper(shortly(t), request{PID: m.pid(), Program: everything()})
	if err != nil {
		t.Fatal(err)
	}
	for at, name := range answer.Steps {
		for range 2 {
			for _, pause := range []time.Duration{0, 2 * time.Millisecond} {
				_, err := runHelper(shortly(t), request{PID: m.pid(), Program: everything(), DieAt: at + 1, Pause: pause})
				// Met awake, QEMU's thread passes more steps, or fewer in the next round.
				if err != nil && !errors.Is(err, ErrHelper) {
					t.Fatalf("killed at step %d, %s: %v", at+1, name, err)
				}
				m.mustGoOn()
			}
		}
	}
	if _, err := Do(shortly(t), m.pid(), everything()); err != nil {
		t.Error(err)
	}
	if m.said.Len() > 0 {
		t.Errorf("QEMU said: %s", m.said)
	}
}
