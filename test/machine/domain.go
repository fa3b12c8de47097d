package machine

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"
)

//go:embed domain.xml.tmpl
var domainText string

// domain is what the description of a domain is made from.
type domain struct {
	Options     Options
	Type        string // libvirt's word for the accelerator
	Emulator    string
	Kernel      string
	Initramfs   string
	CommandLine string
	NoCX16      bool // see Options.cpu
	IOThread    bool
	Serial      string
	Channel     string
	ChannelName string
}

// describe returns the domain's XML for the machine.
func (l *Libvirt) describe(ctx context.Context, m *Machine) (string, error) {
	o := m.options
	guest, linux := o.Guest.(Linux)
	if !linux || o.NUMANodes > 1 || len(o.Args) > 0 {
		return "", errors.New("a domain of libvirt has the Linux guest, one NUMA node, and no arguments of its own")
	}
	guest = guest.withDefaults()
	emulator, err := FindQEMU(ctx, o.QEMU)
	if err != nil {
		return "", err
	}
	if err := UsableAccel(o.Accel); err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	kernel, initramfs, err := guest.files(ctx, filepath.Join(cache, guestCache))
	if err != nil {
		return "", err
	}
	// The daemon sees the cache directory at a place of its own.
	inside := func(path string) string {
		if rest, found := strings.CutPrefix(path, cache+"/"); found {
			return cacheInside + "/" + rest
		}
		return path
	}
	d := domain{
		Options: o, Type: "qemu", Emulator: inside(emulator),
		Kernel: inside(kernel), Initramfs: inside(initramfs), CommandLine: guest.commandLine(),
		NoCX16: o.Accel == TCG, IOThread: o.Disk != nil && o.Disk.IOThread,
		Serial: filepath.Join(m.dir, serialFile), Channel: filepath.Join(m.dir, channelSocket), ChannelName: ChannelName,
	}
	if o.Accel == KVM {
		d.Type = "kvm"
	}
	t, err := template.New("domain.xml").Parse(domainText)
	if err != nil {
		return "", err
	}
	var xml strings.Builder
	if err := t.Execute(&xml, d); err != nil {
		return "", fmt.Errorf("describe domain %s: %w", o.Name, err)
	}
	return xml.String(), nil
}
