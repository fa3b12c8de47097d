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
			got, tag, err := Extract(image(t, state, "t"))
			if err != nil || tag != "t" || !bytes.Equal(got, state) {
				t.Errorf("got %d bytes, tag %q, %v", len(got), tag, err)
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

func TestExtractRefusesAnyOtherByte(t *testing.T) {
	whole := image(t, []byte("state"), "t")
	for _, at := range []int{0, 7, 23, 31, 63, 99, 103, 105, clusterBytes + 7, 2*clusterBytes + 1, 3 * clusterBytes,
		4*clusterBytes + 15, 4*clusterBytes + 35, 5*clusterBytes + 15, 6*clusterBytes + 7, 7*clusterBytes + 5, len(whole) - 1} {
		changed := bytes.Clone(whole)
		changed[at] ^= 0x40
		if _, _, err := Extract(changed); err == nil {
			t.Errorf("byte %#x changed: accepted", at)
		}
	}
	for _, n := range []int{0, clusterBytes, len(whole) - 1} {
		if _, _, err := Extract(whole[:n]); err == nil {
			t.Errorf("cut to %d bytes: accepted", n)
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

// An image is large and almost all zeros, so the fuzzer makes changes to a good one: each 3 bytes of where and 1 of what.
func FuzzExtract(f *testing.F) {
	f.Add([]byte{4, 0, 15, 2, 4, 0, 58, 'x'}, 0)
	f.Add([]byte{}, clusterBytes)
	good := image(f, []byte("state"), "t")
	f.Fuzz(func(t *testing.T, edits []byte, cut int) {
		b := bytes.Clone(good)
		for ; len(edits) >= 4; edits = edits[4:] {
			b[(int(edits[0])<<16|int(edits[1])<<8|int(edits[2]))%len(b)] ^= edits[3]
		}
		b = b[:len(b)-min(len(b), max(0, cut))]
		state, tag, err := Extract(b)
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := Write(&again, state, tag, someDay); err != nil || again.Len() != len(b) {
			t.Errorf("accepted a state of %d bytes with tag %q: %v", len(state), tag, err)
		}
	})
}
