package carrier

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmckpt/vmckpt/node-agent/qemu/devstate"
)

var someDay = time.Date(2026, 5, 4, 3, 2, 1, 7, time.UTC)

func image(t testing.TB, state []byte, tag string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, state, tag, someDay); err != nil {
		t.Fatal(err)
	}
	if int64(b.Len()) != Bytes(state) {
		t.Fatalf("wrote %d bytes, announced %d", b.Len(), Bytes(state))
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	for name, n := range map[string]int{"a byte": 1, "a cluster": clusterBytes, "a cluster and a byte": clusterBytes + 1, "usual": 317000} {
		t.Run(name, func(t *testing.T) {
			state := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7}, n/7+1)[:n]
			got, err := readQCOW2(image(t, state, "t"))
			if err != nil || got.tag != "t" || !got.date.Equal(someDay) || !bytes.Equal(got.state, state) {
				t.Errorf("got %d bytes, tag %q of %v, %v", len(got.state), got.tag, got.date, err)
			}
		})
	}
}

func TestWriteRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		state []byte
		tag   string
		date  time.Time
	}{
		"no state":       {nil, "t", someDay},
		"a huge state":   {make([]byte, devstate.MaxBytes+1), "t", someDay},
		"no tag":         {[]byte{1}, "", someDay},
		"an id as tag":   {[]byte{1}, snapshotID, someDay},
		"a long tag":     {[]byte{1}, strings.Repeat("t", 256), someDay},
		"a tag with NUL": {[]byte{1}, "t\x00", someDay},
		"before time":    {[]byte{1}, "t", time.Unix(-1, 0)},
		"after its end":  {[]byte{1}, "t", time.Unix(1<<32, 0)},
	} {
		if err := Write(new(bytes.Buffer), c.state, c.tag, c.date); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

// The reader that the other tests rely on sees every kind of change.
func TestReaderSeesChanges(t *testing.T) {
	whole := image(t, []byte("state"), "t")
	for _, at := range []int{0, 7, 23, 31, 63, 99, 103, 105, clusterBytes + 7, 2*clusterBytes + 1, 3 * clusterBytes,
		4*clusterBytes + 15, 4*clusterBytes + 35, 5*clusterBytes + 15, 6*clusterBytes + 7, 7*clusterBytes + 5, len(whole) - 1} {
		changed := bytes.Clone(whole)
		changed[at] ^= 0x40
		if got, err := readQCOW2(changed); err == nil && got.tag == "t" && string(got.state) == "state" {
			t.Errorf("byte %#x changed: not seen", at)
		}
	}
	for _, n := range []int{0, clusterBytes, len(whole) - 1} {
		if _, err := readQCOW2(whole[:n]); err == nil {
			t.Errorf("cut to %d bytes: not seen", n)
		}
	}
}

// The reference implementation must find nothing wrong.
func TestQEMUReadsIt(t *testing.T) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skipf("qemu-img is missing: %v", err)
	}
	state := bytes.Repeat([]byte("device state "), 30000)
	path := filepath.Join(t.TempDir(), "carrier.qcow2")
	if err := os.WriteFile(path, image(t, state, "vmckpt-tag"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"check", "-f", "qcow2", path}, "No errors were found on the image."},
		{[]string{"info", "-f", "qcow2", path}, "virtual size: 64 KiB (65536 bytes)"},
		{[]string{"snapshot", "-l", path}, "vmckpt-tag"},
		{[]string{"snapshot", "-l", path}, "381 KiB"},
		{[]string{"snapshot", "-a", "vmckpt-tag", path}, ""},
		{[]string{"check", "-f", "qcow2", path}, "No errors were found on the image."},
	} {
		out, err := exec.Command(tool, c.args...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("qemu-img %v: %v: %s", c.args[0], err, out)
		}
	}
}

// Whatever the state, its length and its tag, what is written is a sound qcow2 with just that in it, or nothing is.
func FuzzWrite(f *testing.F) {
	f.Add([]byte("state"), uint32(5), "t", int64(0))
	f.Add([]byte{0}, uint32(clusterBytes), "vmckpt-tag", someDay.UnixNano())
	f.Add([]byte("QFI\xfb"), uint32(2*clusterBytes+1), strings.Repeat("t", maxTagBytes), int64(1<<32-1)*1e9)
	f.Add([]byte{}, uint32(0), "1", int64(-1))
	f.Fuzz(func(t *testing.T, pattern []byte, length uint32, tag string, nanoseconds int64) {
		var state []byte
		if n := int(length % (4 << 20)); len(pattern) > 0 {
			state = bytes.Repeat(pattern, n/len(pattern)+1)[:n]
		}
		date := time.Unix(0, nanoseconds)
		var b bytes.Buffer
		if err := Write(&b, state, tag, date); err != nil {
			if b.Len() > 0 {
				t.Errorf("refused (%v) after %d bytes", err, b.Len())
			}
			if len(state) > 0 && tag == "t" && nanoseconds >= 0 && date.Unix() < 1<<32 {
				t.Errorf("refused: %v", err)
			}
			return
		}
		got, err := readQCOW2(b.Bytes())
		if err != nil || got.tag != tag || !got.date.Equal(date) || !bytes.Equal(got.state, state) || int64(b.Len()) != Bytes(state) {
			t.Errorf("a state of %d bytes with tag %q of %v: read %d bytes with tag %q of %v: %v", len(state), tag, date, len(got.state), got.tag, got.date, err)
		}
	})
}
