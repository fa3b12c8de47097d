package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/node-agent/qemu/carrier"
	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

// saveState takes the device state through a pipe whose writing end QEMU has inherited as fd 3.
func saveState(t *testing.T, m Monitor, r *os.File) []byte {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- SaveDeviceState(t.Context(), m, "/proc/self/fd/3") }()
	var out bytes.Buffer
	buf := make([]byte, 64<<10)
	for {
		r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		n, err := r.Read(buf)
		out.Write(buf[:n])
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return out.Bytes()
		default:
		}
	}
}

func memfd(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("carrier", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "carrier")
	t.Cleanup(func() { f.Close() })
	return f
}

func refill(t *testing.T, f *os.File, state []byte, tag string) {
	t.Helper()
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if err := carrier.Write(io.NewOffsetWriter(f, 0), state, tag, time.Now()); err != nil {
		t.Fatal(err)
	}
}

func copyMemory(t *testing.T, from, to *Process, fromLayout, toLayout Layout) {
	t.Helper()
	open := func(p *Process) *os.File {
		f, err := os.OpenFile(p.dir()+"/mem", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	src, dst := open(from), open(to)
	for i, b := range fromLayout {
		content := make([]byte, b.Bytes)
		if _, err := src.ReadAt(content, int64(b.HVA)); err != nil {
			t.Fatal(err)
		}
		if toLayout[i].Name != b.Name || toLayout[i].Bytes != b.Bytes {
			t.Fatalf("block %+v against %+v", b, toLayout[i])
		}
		if _, err := dst.WriteAt(content, int64(toLayout[i].HVA)); err != nil {
			t.Fatal(err)
		}
	}
}

// The whole way of a device state: out of a running VM, into a fresh one that stands, which then has the same state. A
// state that does not fit is an error, and the QEMU lives.
func TestDeviceStateFromOneQEMUToAnother(t *testing.T) {
	args := []string{"-machine", "q35", "-m", "64", "-device", "VGA", "-device", "virtio-balloon-pci,id=b", "-device", "qemu-xhci"}
	forEachQEMU(t, func(t *testing.T, e emulator) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		source := e.start(t, []*os.File{w}, args...)
		w.Close()
		ms := source.dial(t)
		ps := source.find(t)
		time.Sleep(500 * time.Millisecond) // the firmware gets somewhere
		if err := ms.Execute(t.Context(), "stop", nil, nil); err != nil {
			t.Fatal(err)
		}
		state := saveState(t, ms, r)
		saved, err := devstate.Parse(state)
		if err != nil {
			t.Fatal(err)
		}
		machine, err := MachineType(t.Context(), ms)
		if err != nil {
			t.Fatal(err)
		}
		loadable, err := devstate.Loadable(state, machine)
		if err != nil {
			t.Fatal(err)
		}

		// The same VM again, standing, with a memfd as fd 3.
		file := memfd(t)
		target := e.start(t, []*os.File{file}, append(args, "-S")...)
		mt := target.dial(t)
		pt := target.find(t)
		layoutOf := func(m Monitor, p *Process) Layout {
			l, err := ReadLayout(t.Context(), m, p)
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		from := layoutOf(ms, ps)

		refill(t, file, []byte("QEVM\x00\x00\x00\x03 nonsense"), "bad")
		var refused *LoadError
		if err := LoadDeviceState(t.Context(), mt, "/proc/self/fd/3", "bad"); !errors.As(err, &refused) {
			t.Errorf("nonsense gave %v", err)
		}
		other, err := devstate.Loadable(state, "pc-i440fx-2.0")
		if err != nil {
			t.Fatal(err)
		}
		refill(t, file, other, "other")
		if err := LoadDeviceState(t.Context(), mt, "/proc/self/fd/3", "other"); !errors.As(err, &refused) {
			t.Errorf("another machine type gave %v", err)
		}
		refill(t, file, loadable, "good")
		if err := LoadDeviceState(t.Context(), mt, "/proc/self/fd/3", "no-such-tag"); err == nil {
			t.Error("a tag that is not there was loaded")
		}

		before := len(target.stderr.String())
		for range 2 { // the second time the QEMU is a used one
			copyMemory(t, ps, pt, from, layoutOf(mt, pt))
			refill(t, file, loadable, "good")
			start := time.Now()
			if err := LoadDeviceState(t.Context(), mt, "/proc/self/fd/3", "good"); err != nil {
				t.Fatal(err)
			}
			t.Logf("loaded in %v", time.Since(start))
		}
		if said := target.stderr.String()[before:]; said != "" {
			t.Errorf("qemu said %q", said)
		}
		if a, b := registers(t, ms), registers(t, mt); a != b {
			t.Errorf("registers: before %s\nafter %s", a, b)
		}
		for _, query := range []string{"query-jobs", "query-named-block-nodes"} {
			var left []json.RawMessage
			if err := mt.Execute(t.Context(), query, nil, &left); err != nil || len(left) > 0 {
				t.Errorf("%s: %v, %s", query, err, left)
			}
		}
		if err := mt.Execute(t.Context(), "cont", nil, nil); err != nil {
			t.Fatal(err)
		}
		if s, err := Status(t.Context(), mt); s != StateRunning || err != nil {
			t.Errorf("afterwards %q, %v", s, err)
		}
		if len(saved.Sections) < 20 {
			t.Errorf("%d sections", len(saved.Sections))
		}
	})
}

func registers(t *testing.T, m Monitor) string {
	t.Helper()
	out, err := Human(context.WithoutCancel(t.Context()), m, "info registers")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A checkpoint of an older QEMU goes into a newer one that has its machine type, and the comparison says so beforehand.
func TestDeviceStateIntoNewerQEMU(t *testing.T) {
	older, newer := qemu72(t), qemu10(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	args := []string{"-machine", "pc-q35-7.2", "-cpu", "Westmere", "-m", "64", "-smp", "2", "-device", "VGA", "-device", "virtio-balloon-pci,id=b",
		"-device", "qemu-xhci", "-device", "usb-tablet", "-device", "pcie-root-port,id=rp", "-device", "virtio-serial-pci,bus=rp",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"}
	source := older.start(t, []*os.File{w}, args...)
	w.Close()
	ms, ps := source.dial(t), source.find(t)
	time.Sleep(500 * time.Millisecond)
	if err := ms.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	loadable, err := devstate.Loadable(saveState(t, ms, r), "pc-q35-7.2")
	if err != nil {
		t.Fatal(err)
	}
	file := memfd(t)
	refill(t, file, loadable, "old")
	target := newer.start(t, []*os.File{file}, append(args, "-S")...)
	mt, pt := target.dial(t), target.find(t)

	recorded, err := Describe(t.Context(), ms, ps)
	if err != nil {
		t.Fatal(err)
	}
	present, err := Describe(t.Context(), mt, pt)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range Compare(recorded, present) {
		if d.Fatal {
			t.Errorf("forwards: %v", d)
		} else {
			t.Logf("forwards: %v", d)
		}
	}
	if back := Compare(present, recorded); len(back) == 0 || !back[0].Fatal || back[0].What != "QEMU version" {
		t.Errorf("backwards: %v", back)
	}

	from, err := ReadLayout(t.Context(), ms, ps)
	if err != nil {
		t.Fatal(err)
	}
	to, err := ReadLayout(t.Context(), mt, pt)
	if err != nil {
		t.Fatal(err)
	}
	copyMemory(t, ps, pt, from, to)
	if err := LoadDeviceState(t.Context(), mt, "/proc/self/fd/3", "old"); err != nil {
		t.Fatal(err)
	}
	if err := mt.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := Status(t.Context(), mt); s != StateRunning || err != nil {
		t.Errorf("afterwards %q, %v", s, err)
	}
}
