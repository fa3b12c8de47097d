package pagetable

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const smapsText = `7f0a00000000-7f0a40000000 rw-p 00000000 00:00 0 
Size:            1048576 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:              204800 kB
AnonHugePages:    131072 kB
ShmemPmdMapped:        0 kB
FilePmdMapped:         0 kB
Locked:                0 kB
THPeligible:           1
ProtectionKey:         0
VmFlags: rd wr mr mw me ac sd uw hg mg 
7f0a80000000-7f0ac0000000 rw-s 00200000 00:01 1030                       /memfd:pc.ram: a (deleted)
KernelPageSize:     2048 kB
MMUPageSize:        2048 kB
VmFlags: rd wr sh mr mw me ms ht um ui lo
555500000000-555500001000 r-xp 00001000 fe:01 18446744073709551615 /usr/bin/a:b-c\012d
VmFlags: 
`

func TestParseMappings(t *testing.T) {
	got, err := ParseMappings(strings.NewReader(smapsText))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mapping{
		{
			Start: 0x7f0a00000000, End: 0x7f0a40000000, Read: true, Write: true,
			KernelPageBytes: 4096, MMUPageBytes: 4096, RSSBytes: 200 << 20, AnonHugeBytes: 128 << 20,
			Flags: "rd wr mr mw me ac sd uw hg mg",
		},
		{
			Start: 0x7f0a80000000, End: 0x7f0ac0000000, Read: true, Write: true, Shared: true,
			Offset: 2 << 20, DeviceMinor: 1, Inode: 1030, Path: "/memfd:pc.ram: a (deleted)",
			KernelPageBytes: 2 << 20, MMUPageBytes: 2 << 20, Flags: "rd wr sh mr mw me ms ht um ui lo",
		},
		{
			Start: 0x555500000000, End: 0x555500001000, Read: true, Execute: true,
			Offset: 0x1000, DeviceMajor: 0xfe, DeviceMinor: 1, Inode: 1<<64 - 1, Path: `/usr/bin/a:b-c\012d`,
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	type flags struct{ WP, Missing, Minor, HugeTLB, Mergeable, SoftDirty, Locked bool }
	of := func(f VMFlags) flags {
		return flags{f.WriteProtectRegistered(), f.MissingRegistered(), f.MinorRegistered(), f.HugeTLB(), f.Mergeable(), f.SoftDirty(), f.Locked()}
	}
	if diff := cmp.Diff(flags{WP: true, Mergeable: true, SoftDirty: true}, of(got[0].Flags)); diff != "" {
		t.Errorf("first (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(flags{Missing: true, Minor: true, HugeTLB: true, Locked: true}, of(got[1].Flags)); diff != "" {
		t.Errorf("second (-want +got):\n%s", diff)
	}
}

func TestParseMappingsRefuses(t *testing.T) {
	for _, text := range []string{
		"Rss: 4 kB\n",
		"nonsense\n",
		"1000-2000 rw-p 0 00:00\n",
		"2000-1000 rw-p 00000000 00:00 0\n",
		"1000-2000 rw- 00000000 00:00 0\n",
		"1000-2000 rw-p 00000000 0000 0\n",
		"1000-20000000000000000 rw-p 00000000 00:00 0\n",
		"1000-2000 rw-p 00000000 100000000:00 0\n",
		"1000-2000 rw-p 00000000 00:00 0\nRss: many kB\n",
		"1000-2000 rw-p 00000000 00:00 0\nRss: 4 MB\n",
		"1000-2000 rw-p 00000000 00:00 0\nRss: 18014398509481984 kB\n",
		"1000-2000 rw-p 00000000 00:00 0 " + strings.Repeat("x", longestLine) + "\n",
	} {
		if got, err := ParseMappings(strings.NewReader(text)); err == nil {
			t.Errorf("%.60q: got %+v", text, got)
		}
	}
}

func FuzzParseMappings(f *testing.F) {
	f.Add([]byte(smapsText))
	if own, err := os.ReadFile("/proc/self/smaps"); err == nil {
		f.Add(own[:min(len(own), 4096)])
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		mappings, err := ParseMappings(bytes.NewReader(text))
		if err != nil {
			return
		}
		for _, m := range mappings {
			if m.End <= m.Start {
				t.Errorf("mapping %#x-%#x", m.Start, m.End)
			}
			if m.Flags.WriteProtectRegistered() && !strings.Contains(string(m.Flags), "uw") {
				t.Errorf("flags %q", m.Flags)
			}
		}
	})
}

func TestMappingsOfChild(t *testing.T) {
	c := startChild(t)
	for name, list := range map[string]func(int) ([]Mapping, error){"smaps": Mappings, "maps": Maps} {
		t.Run(name, func(t *testing.T) {
			found := 0
			for _, m := range c.mappings(list) {
				switch m.Start {
				case c.Addresses[small]:
					found++
					if m.Bytes() != regionBytes || !m.Write || m.Shared || m.Inode != 0 || m.Path != "" {
						t.Errorf("private region: %+v", m)
					}
				case c.Addresses[shared]:
					found++
					if m.Bytes() != regionBytes || !m.Write || !m.Shared || m.Inode == 0 || m.Path != "/memfd:guest ram (deleted)" {
						t.Errorf("shared region: %+v", m)
					}
				}
			}
			if found != 2 {
				t.Errorf("%d regions of 2 found", found)
			}
		})
	}
	if _, err := Mappings(1 << 30); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

func TestMapsWithin(t *testing.T) {
	all, err := Maps(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		all[i].Path = ""
	}
	n := len(all)
	for name, ranges := range map[string][]Range{
		"one mapping":           {{all[2].Start, all[2].End}},
		"a part of one":         {{all[1].Start, all[1].Start + 4096}},
		"neighbours":            {{all[0].Start, all[3].End}},
		"two parts of one":      {{all[1].Start, all[1].Start + 4096}, {all[1].End - 4096, all[1].End}},
		"in no order":           {{all[3].Start, all[3].End}, {all[0].Start, all[0].End}},
		"before all":            {{4096, 8192}},
		"between, and nothing":  {{all[0].Start - 4096, all[0].Start}},
		"from before to behind": {{all[0].Start - 4096, all[1].End + 4096}},
	} {
		got, err := MapsWithin(os.Getpid(), ranges)
		if err != nil {
			t.Fatal(err)
		}
		var want []Mapping
		for _, m := range all[:n-1] { // the last is the vsyscall page, which queries do not know
			if slices.ContainsFunc(ranges, func(r Range) bool { return m.Start < r.End && m.End > r.Start }) {
				want = append(want, m)
			}
		}
		if len(got) > len(want) { // an old kernel: all of them
			t.Skip("PROCMAP_QUERY needs Linux 6.11")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if _, err := MapsWithin(1<<30, []Range{{0, 4096}}); err == nil {
		t.Error("mappings of a process that is not there")
	}
}
