package machine

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// Files in a machine's directory. Socket paths are bounded to 107 bytes by the kernel, so they are short.
const (
	productSocket = "qmp"
	testSocket    = "qmp-test"
	channelSocket = "channel"
	serialFile    = "serial.log"
	outputFile    = "qemu.log"
	diskFile      = "disk.raw"
)

// ChannelName is the name of the virtio-serial port that the Linux guest answers on.
const ChannelName = "org.vmckpt.test.0"

// arguments returns QEMU's command line for the machine, after the guest's own part. o has its defaults.
func (o Options) arguments(dir string, guest []string) []string {
	file := func(name string) string { return filepath.Join(dir, name) }
	args := []string{
		"-name", "guest=" + o.Name + ",debug-threads=on",
		"-uuid", o.UUID,
		"-no-user-config", "-nodefaults", "-display", "none",
		"-msg", "timestamp=on",
		"-accel", string(o.Accel),
		"-cpu", o.cpu(),
		"-m", strconv.FormatUint(o.MemoryBytes/MiB, 10),
		"-smp", strconv.Itoa(o.VCPUs),
		"-rtc", "base=utc",
		"-no-shutdown",
		"-chardev", "socket,id=monitor,server=on,wait=off,path=" + file(productSocket),
		"-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=monitor-test,server=on,wait=off,path=" + file(testSocket),
		"-mon", "chardev=monitor-test,mode=control",
		"-chardev", "file,id=serial0,path=" + file(serialFile),
		"-device", "isa-serial,id=serial0,chardev=serial0",
	}
	args = append(args, o.memoryArguments()...)
	if o.Paused {
		args = append(args, "-S")
	}
	args = append(args, o.deviceArguments(file)...)
	args = append(args, guest...)
	return append(args, o.Args...)
}

// cpu returns the processor's model. QEMU 7.2's TCG corrupts the flags after cmpxchg16b now and then (seen: one boot of
// Linux 6.12 in twenty ends in a double fault in kmem_cache_alloc); without the instruction Linux takes another way.
func (o Options) cpu() string {
	if o.Accel == TCG {
		return "qemu64,-cx16"
	}
	return "qemu64"
}

func (o Options) memoryArguments() []string {
	backend := func(id string, bytes uint64) string {
		kind := map[Memory]string{
			Private:      "memory-backend-ram",
			Memfd:        "memory-backend-memfd,share=on",
			MemfdPrivate: "memory-backend-memfd,share=off",
		}[o.Memory]
		return fmt.Sprintf("%s,id=%s,size=%d", kind, id, bytes)
	}
	machine := o.MachineType + ",usb=off,vmport=off,dump-guest-core=off"
	if o.NUMANodes == 1 {
		return []string{"-machine", machine + ",memory-backend=pc.ram", "-object", backend("pc.ram", o.MemoryBytes)}
	}
	args := []string{"-machine", machine}
	for n := range o.NUMANodes {
		id := "ram-node" + strconv.Itoa(n)
		args = append(args,
			"-object", backend(id, o.MemoryBytes/uint64(o.NUMANodes)),
			"-numa", fmt.Sprintf("node,nodeid=%d,memdev=%s", n, id))
		if n == 0 {
			args[len(args)-1] += fmt.Sprintf(",cpus=0-%d", o.VCPUs-1)
		}
	}
	return args
}

// deviceArguments puts each virtio device behind a PCIe root port of its own, as libvirt does.
func (o Options) deviceArguments(file func(string) string) []string {
	var args []string
	ports := 0
	device := func(format string, values ...any) {
		ports++
		port := "pci." + strconv.Itoa(ports)
		args = append(args,
			"-device", fmt.Sprintf("pcie-root-port,id=%s,chassis=%d,port=%d,bus=pcie.0,addr=%#x", port, ports, ports, ports+1),
			"-device", fmt.Sprintf(format, values...)+",bus="+port)
	}
	if _, linux := o.Guest.(Linux); linux {
		device("virtio-serial-pci-non-transitional,id=virtio-serial0")
		args = append(args,
			"-chardev", "socket,id=channel0,server=on,wait=off,path="+file(channelSocket),
			"-device", "virtserialport,bus=virtio-serial0.0,nr=1,chardev=channel0,id=channel0,name="+ChannelName)
	}
	if d := o.Disk; d != nil {
		// Two machines may have the same file open, the one that was captured and the one restored: the guest never
		// changes its content, so QEMU's locking is off.
		args = append(args, "-blockdev", fmt.Sprintf("driver=file,node-name=disk0-file,filename=%s,aio=%s,locking=off,cache.direct=%s",
			d.Path, d.AIO, onOff(d.Direct)))
		args = append(args, "-blockdev", "driver=raw,node-name=disk0,file=disk0-file,cache.direct="+onOff(d.Direct))
		thread := ""
		if d.IOThread {
			args = append(args, "-object", "iothread,id=iothread0")
			thread = ",iothread=iothread0"
		}
		device("virtio-blk-pci-non-transitional,id=disk0,drive=disk0,write-cache=on,werror=stop,rerror=stop%s", thread)
	}
	if o.Net {
		args = append(args, "-netdev", "user,id=net0,restrict=on")
		device("virtio-net-pci-non-transitional,id=net0,netdev=net0,mac=52:54:00:12:34:56,romfile=")
	}
	if o.Balloon {
		device("virtio-balloon-pci-non-transitional,id=balloon0,free-page-reporting=%s", onOff(o.FreePageReporting))
	}
	return args
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// shellWords is the command line as a person would type it, for a failed test's log.
func shellWords(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if strings.ContainsAny(a, " '\"$") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		b.WriteString(a)
	}
	return b.String()
}
