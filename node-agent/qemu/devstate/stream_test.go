package devstate

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// builder writes streams as QEMU does.
type builder struct{ bytes.Buffer }

func newStream() *builder {
	b := new(builder)
	b.WriteString("QEVM\x00\x00\x00\x03")
	return b
}

func (b *builder) u32(v uint32) *builder {
	b.Write(binary.BigEndian.AppendUint32(nil, v))
	return b
}

func (b *builder) header(id uint32, name string, instance, version uint32) *builder {
	b.WriteByte(typeSectionFull)
	b.u32(id).WriteByte(byte(len(name)))
	b.WriteString(name)
	return b.u32(instance).u32(version)
}

func (b *builder) footer(id uint32) *builder {
	b.WriteByte(typeSectionFooter)
	return b.u32(id)
}

func (b *builder) section(id uint32, name string, instance, version uint32, state string) *builder {
	b.header(id, name, instance, version).WriteString(state)
	return b.footer(id)
}

func (b *builder) end() []byte {
	b.WriteByte(typeEOF)
	return b.Bytes()
}

// Sections need not come in the order of their ids: QEMU saves bridges and interrupt controllers first.
func sample() []byte {
	return newStream().
		section(46, "0000:00:05.0/pcie-root-port", 0, 1, "root port").
		section(0, "timer", 0, 2, strings.Repeat("\x00", 24)).
		section(4, "cpu_common", 0, 1, "").
		section(5, "cpu_common", 1, 1, "~\x00\x00\x00\x05 is no footer, nor is ~\x00\x00\x00\x00\x04").
		end()
}

func TestParse(t *testing.T) {
	got, err := Parse(sample())
	if err != nil {
		t.Fatal(err)
	}
	want := &Stream{Sections: []Section{
		{46, "0000:00:05.0/pcie-root-port", 0, 1, 49, 9},
		{0, "timer", 0, 2, 82, 24},
		{4, "cpu_common", 0, 1, 135, 0},
		{5, "cpu_common", 1, 1, 164, 33},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	empty, err := Parse(newStream().end())
	if err != nil || len(empty.Sections) != 0 {
		t.Errorf("a stream without sections: %v, %v", empty, err)
	}
}

func TestParseRefuses(t *testing.T) {
	whole := sample()
	// A state that holds a footer of its own section, then a header, can be read in two ways if that header's section ends.
	twice := newStream().
		header(1, "a", 0, 1).footer(1).header(2, "b", 0, 1).footer(1).header(2, "b", 0, 1).footer(2).end()
	crowd := newStream()
	crowd.header(1, "a", 0, 1)
	for range maxBoundaries + 1 {
		crowd.footer(1).header(1, "a", 0, 1)
	}
	for name, stream := range map[string][]byte{
		"nothing":             nil,
		"another magic":       append([]byte("QEVX"), whole[4:]...),
		"another version":     append([]byte("QEVM\x00\x00\x00\x02"), whole[8:]...),
		"header alone":        whole[:8],
		"no end mark":         whole[:len(whole)-1],
		"no last footer":      append(whole[:len(whole)-6:len(whole)-6], 0),
		"something behind":    append(whole[:len(whole):len(whole)], 1),
		"end in the middle":   append(append(whole[:8:8], 0), whole[8:]...),
		"two readings":        twice,
		"an id twice":         newStream().section(1, "a", 0, 1, "x").section(1, "b", 0, 1, "y").end(),
		"too many boundaries": crowd.end(),
		"part of a section":   append(append(whole[:8:8], 2), whole[9:]...),
		"configuration cut":   append(whole[:8:8], 7, 0, 0, 0, 9, 'p', 'c'),
		"configuration empty": append(append(whole[:8:8], 7, 0, 0, 0, 0), whole[8:]...),
		"description cut":     append(whole[:len(whole):len(whole)], 6, 0, 0, 0, 3, '{', '}'),
		"huge":                make([]byte, MaxBytes+1),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(stream)
			var format *FormatError
			if !errors.As(err, &format) {
				t.Errorf("gave %+v, %v", got, err)
			}
		})
	}
}

func TestLoadable(t *testing.T) {
	saved := sample()
	loadable, err := Loadable(saved, "pc-q35-10.0")
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0bpc-q35-10.0"), saved[8:]...)
	want = append(want, "\x06\x00\x00\x00\x02{}"...)
	if !bytes.Equal(loadable, want) {
		t.Errorf("got %q", loadable)
	}
	before, _ := Parse(saved)
	after, err := Parse(loadable)
	if err != nil || after.Machine != "pc-q35-10.0" || string(after.Description) != "{}" {
		t.Fatalf("read back as %+v, %v", after, err)
	}
	if err := SameDevices(before.Sections, after.Sections); err != nil {
		t.Error(err)
	}
	if _, err := Loadable(loadable, "pc-q35-10.0"); err == nil {
		t.Error("made loadable twice")
	}
	if _, err := Loadable(saved, ""); err == nil {
		t.Error("made loadable for no machine")
	}
}

func TestSameDevices(t *testing.T) {
	a, b, c := Section{ID: 1, Name: "a"}, Section{ID: 2, Name: "b"}, Section{ID: 3, Name: "c"}
	longer := a
	longer.Bytes = 7
	other := b
	other.Version = 9
	for name, s := range map[string]struct {
		before, now []Section
		want        string
	}{
		"same":            {[]Section{a, b}, []Section{longer, b}, ""},
		"plugged":         {[]Section{a, b}, []Section{a, b, c}, "device state: c instance 0 version 0 is new"},
		"plugged before":  {[]Section{a, b}, []Section{c, a, b}, "device state: c instance 0 version 0 is new"},
		"unplugged":       {[]Section{a, b}, []Section{a}, "device state: b instance 0 version 0 is gone"},
		"another version": {[]Section{a, b}, []Section{a, other}, "device state: b instance 0 version 9 stands where b instance 0 version 0 was"},
	} {
		t.Run(name, func(t *testing.T) {
			got := ""
			if err := SameDevices(s.before, s.now); err != nil {
				got = err.Error()
			}
			if got != s.want {
				t.Errorf("got %q, want %q", got, s.want)
			}
		})
	}
}

// realStreams are what QEMU 7.2 and 10.0 wrote for a q35 machine under TCG with Debian's kernel at work: two streams of 245 KB by
// xen-save-devices-state, of a machine with virtio disk, network card, serial port and balloon, each behind a root port of its own.
func realStreams(t testing.TB) map[string][]byte {
	t.Helper()
	streams := map[string][]byte{}
	for _, name := range []string{"qemu-7.2", "qemu-10.0"} {
		f, err := os.Open(filepath.Join("testdata", name+".gz"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		unpacked, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		if streams[name], err = io.ReadAll(unpacked); err != nil {
			t.Fatal(err)
		}
	}
	return streams
}

func TestRealStreams(t *testing.T) {
	for name, stream := range realStreams(t) {
		t.Run(name, func(t *testing.T) {
			s, err := Parse(stream)
			if err != nil {
				t.Fatal(err)
			}
			names := map[string]int{}
			for _, section := range s.Sections {
				names[section.Name]++
			}
			for _, device := range []string{"cpu", "apic", "ioapic", "hpet", "mc146818rtc", "serial", "0000:00:1f.0/ICH9LPC"} {
				if names[device] != 1 {
					t.Errorf("%d sections %s", names[device], device)
				}
			}
			if len(s.Sections) != 42 {
				t.Errorf("%d sections: %v", len(s.Sections), s.Sections)
			}
			for cut := 0; cut < len(stream); cut += 997 {
				if _, err := Parse(stream[:cut]); err == nil {
					t.Errorf("accepted with %d of %d bytes", cut, len(stream))
				}
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, stream := range realStreams(f) {
		f.Add(stream)
		loadable, err := Loadable(stream, "pc-q35-7.2")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(loadable)
	}
	f.Add(sample())
	loadable, _ := Loadable(sample(), "pc-q35-10.0")
	f.Add(loadable)
	f.Add(newStream().end())
	f.Fuzz(func(t *testing.T, stream []byte) {
		s, err := Parse(stream)
		if err != nil {
			return
		}
		// What was accepted must tile the stream: headers, states and footers, nothing between them.
		at := headerBytes
		if s.Machine != "" {
			at += 5 + len(s.Machine)
		}
		for _, sec := range s.Sections {
			if sec.Offset != at+14+len(sec.Name) || sec.Bytes < 0 {
				t.Fatalf("section %+v after byte %d", sec, at)
			}
			at = sec.Offset + sec.Bytes + footerBytes
			if got := binary.BigEndian.Uint32(stream[at-4:]); stream[at-footerBytes] != typeSectionFooter || got != sec.ID {
				t.Fatalf("section %+v has the footer of %d", sec, got)
			}
		}
		if !endsStream(stream, at) {
			t.Fatalf("sections end at byte %d, the stream does not", at)
		}
		if s.Machine == "" && s.Description == nil {
			if _, err := Loadable(stream, "pc"); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestHasNestedGuests(t *testing.T) {
	const name = "cpu/kvm_nested_state"
	processor := func(state string) []byte { return []byte("before" + state + "after") }
	for state, want := range map[string]bool{
		"\x05" + string(rune(len(name))) + name + "\x00\x00\x00\x01": true,
		"\x05\x10cpu/nested_state":                                   false, // of another accelerator's, or a name that only looks like it
		name:                                                         false,
		"":                                                           false,
	} {
		if got := HasNestedGuests(processor(state)); got != want {
			t.Errorf("%q: %v, want %v", state, got, want)
		}
	}
}
