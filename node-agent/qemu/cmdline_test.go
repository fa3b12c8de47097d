package qemu

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseKeyval(t *testing.T) {
	for in, want := range map[string]map[string]string{
		"":                            {},
		"plain":                       {"first": "plain"},
		"guest=a,debug-threads=on":    {"guest": "a", "debug-threads": "on"},
		"a,,b,c=1,,2,d":               {"first": "a,b", "c": "1,2", "d": "on"},
		"/path,server,nowait,no=x":    {"first": "/path", "server": "on", "wait": "off", "no": "x"},
		"a=1,a=2":                     {"a": "2"},
		"x=,,":                        {"x": ","},
		"socket,path=/a=b,id=m,":      {"first": "socket", "path": "/a=b", "id": "m"},
		"pc-q35-10.0,usb=off,acpi=on": {"first": "pc-q35-10.0", "usb": "off", "acpi": "on"},
	} {
		if d := cmp.Diff(want, parseKeyval(in, "first")); d != "" {
			t.Errorf("%q: %s", in, d)
		}
	}
}

func TestCommandLine(t *testing.T) {
	const uuid = "dd75a760-ca42-402a-9170-c596ddd06a4e"
	for name, c := range map[string]struct {
		args    string // separated by blanks, # for a blank
		guest   string
		uuid    string
		paths   []string
		libvirt bool
	}{
		"by hand": {"-name vm -qmp unix:/a,server,nowait -uuid " + strings.ToUpper(uuid), "vm", uuid, []string{"/a"}, false},
		"libvirt": {"-name guest=ns_vm,debug-threads=on -S -chardev socket,id=charmonitor,fd=20,server=on,wait=off " +
			"-mon chardev=charmonitor,id=monitor,mode=control -uuid " + uuid, "ns_vm", uuid, nil, true},
		"old libvirt": {"-name guest=ns_vm -chardev socket,id=charmonitor,path=/m.sock,server=on -mon chardev=charmonitor,mode=control",
			"ns_vm", "", nil, true},
		"a monitor of its own":   {"--name x -mon m,mode=control -chardev socket,id=m,path=rel/q,server=on", "x", "", []string{"rel/q"}, false},
		"the human monitor":      {"-mon m -chardev socket,id=m,path=/h,server=on -monitor unix:/i,server=on", "", "", nil, false},
		"clients and other ways": {"-qmp tcp:localhost:1,server=on -qmp unix:/c -qmp stdio", "", "", nil, false},
		"another's arguments":    {"-append -name#guest=evil -fw_cfg -name -kernel -uuid -name good disk.img", "good", "", nil, false},
		"flags before":           {"-S -nodefaults -nographic -daemonize -name vm", "vm", "", nil, false},
		"the last one counts":    {"-name a -name debug-threads=on -name b", "b", "", nil, false},
		"cut off":                {"-name", "", "", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			args := strings.Fields(c.args)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "#", " ")
			}
			opts := parseOptions(args)
			paths, libvirt := qmpPaths(opts)
			if g, u := guestName(opts), uuidOption(opts); g != c.guest || u != c.uuid || libvirt != c.libvirt {
				t.Errorf("guest %q, uuid %q, libvirt %v", g, u, libvirt)
			}
			if d := cmp.Diff(c.paths, paths); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestFirmwareOption(t *testing.T) {
	for args, want := range map[string]string{
		"":                          "",
		"-bios OVMF.fd":             "OVMF.fd",
		"-pflash a.fd":              "pflash a.fd",
		"-machine q35,pflash0=node": "pflash node",
		"-drive if=pflash,unit=1,file=v -drive if=pflash,unit=0,file=c": "pflash c",
		"-drive if=virtio,file=d": "",
	} {
		if got := firmwareOption(parseOptions(strings.Fields(args))); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}

func TestIsQEMU(t *testing.T) {
	for argv0, want := range map[string]bool{
		"/usr/bin/qemu-system-x86_64": true, "qemu-system-aarch64": true, "/usr/libexec/qemu-kvm": true, "kvm": true,
		"/usr/bin/qemu-img": false, "qemu-nbd": false, "bash": false, "": false,
	} {
		if got := isQEMU(argv0); got != want {
			t.Errorf("%q: %v", argv0, got)
		}
	}
}

func FuzzCommandLine(f *testing.F) {
	f.Add("-name\x00guest=a,,b\x00-qmp\x00unix:/a,server\x00-chardev\x00socket,id=m,path=x\x00-mon\x00m,mode=control")
	f.Fuzz(func(t *testing.T, cmdline string) {
		opts := parseOptions(strings.Split(cmdline, "\x00"))
		guestName(opts)
		uuidOption(opts)
		qmpPaths(opts)
		firmwareOption(opts)
	})
}
