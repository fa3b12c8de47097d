package qemu

import (
	"path/filepath"
	"strings"
)

// option is one option of QEMU's command line, its name without dashes.
type option struct {
	name, value string
}

// flagOptions are the options that take no argument, of QEMU 4 to 10 (qemu-options.hx, entries without HAS_ARG). Every
// other option takes exactly one. The table keeps the argument of one option (a guest's kernel command line, say)
// from being read as another option.
var flagOptions = set(
	"h", "help", "version", "S", "s", "alt-grab", "ctrl-grab", "audio-help", "curses", "daemonize", "enable-fips",
	"enable-kvm", "full-screen", "localtime", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-frame", "no-hpet",
	"no-kvm", "no-kvm-irqchip", "no-kvm-pit", "no-kvm-pit-reinjection", "no-quit", "no-reboot", "no-shutdown",
	"no-user-config", "nodefaults", "nodefconfig", "nographic", "old-param", "one-insn-per-tb", "only-migratable",
	"portrait", "preconfig", "sdl", "semihosting", "show-cursor", "singlestep", "snapshot", "tdf", "usb", "win2k-hack",
	"xen-attach", "xen-domid-restrict",
)

// parseOptions splits a command line (without the program's name) into options. What stands alone is a disk image and
// left out.
func parseOptions(args []string) []option {
	var opts []option
	for i := 0; i < len(args); i++ {
		if len(args[i]) < 2 || args[i][0] != '-' {
			continue
		}
		o := option{name: strings.TrimPrefix(args[i][1:], "-")}
		if !flagOptions[o.name] && i+1 < len(args) {
			i++
			o.value = args[i]
		}
		opts = append(opts, o)
	}
	return opts
}

// parseKeyval reads QEMU's comma-separated parameters: "a=1,b,,c=2" has a "," in the value of a, doubled. A first
// parameter without "=" belongs to implied; later ones are flags, on unless they begin with "no".
func parseKeyval(s, implied string) map[string]string {
	kv := make(map[string]string)
	for first := true; s != ""; first = false {
		var field strings.Builder
		for s != "" {
			i := strings.IndexByte(s, ',')
			if i < 0 {
				field.WriteString(s)
				s = ""
				break
			}
			field.WriteString(s[:i])
			s = s[i+1:]
			if !strings.HasPrefix(s, ",") {
				break
			}
			field.WriteByte(',')
			s = s[1:]
		}
		key, value, ok := strings.Cut(field.String(), "=")
		switch {
		case ok:
			kv[key] = value
		case first && implied != "":
			kv[implied] = field.String()
		case strings.HasPrefix(key, "no") && key != "no":
			kv[key[2:]] = "off"
		default:
			kv[key] = "on"
		}
	}
	return kv
}

// guestName is what -name gives: the last one counts, as for QEMU.
func guestName(opts []option) string {
	name := ""
	for _, o := range opts {
		if o.name == "name" {
			if g, ok := parseKeyval(o.value, "guest")["guest"]; ok {
				name = g
			}
		}
	}
	return name
}

func uuidOption(opts []option) string {
	uuid := ""
	for _, o := range opts {
		if o.name == "uuid" {
			uuid = strings.ToLower(o.value)
		}
	}
	return uuid
}

// libvirtChardev is the id that libvirt gives the character device of its monitor. That monitor serves one client, and
// libvirt is it.
const libvirtChardev = "charmonitor"

// qmpPaths lists the unix sockets on which QEMU listens for QMP clients other than libvirt, as the command line gives
// them: in the process's own file system, perhaps relative to where it was started.
func qmpPaths(opts []option) (paths []string, libvirt bool) {
	chardevs := make(map[string]map[string]string)
	for _, o := range opts {
		switch o.name {
		case "qmp", "qmp-pretty":
			if rest, ok := strings.CutPrefix(o.value, "unix:"); ok {
				if kv := parseKeyval(rest, "path"); kv["server"] == "on" {
					paths = append(paths, kv["path"])
				}
			}
		case "chardev":
			kv := parseKeyval(o.value, "backend")
			chardevs[kv["id"]] = kv
		}
	}
	for _, o := range opts {
		if o.name != "mon" {
			continue
		}
		kv := parseKeyval(o.value, "chardev")
		c := chardevs[kv["chardev"]]
		switch {
		case kv["mode"] != "control":
		case kv["chardev"] == libvirtChardev:
			libvirt = true
		case c["backend"] == "socket" && c["path"] != "" && c["server"] == "on":
			paths = append(paths, c["path"])
		}
	}
	return paths, libvirt
}

// isQEMU tells a system emulator by its program name: qemu-system-ARCH, RHEL's qemu-kvm, and the old name kvm.
func isQEMU(argv0 string) bool {
	switch base := filepath.Base(argv0); {
	case strings.HasPrefix(base, "qemu-system-"), base == "qemu-kvm", base == "kvm":
		return true
	}
	return false
}

func set(names ...string) map[string]bool {
	m := make(map[string]bool, len(names))
	for _, n := range names {
		m[n] = true
	}
	return m
}
