package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmckpt/vmckpt/test/guest/linux"
	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
)

// Load is something that the Linux guest works at; the init command's documentation says what each does.
type Load string

const (
	Counter Load = "counter" // counts, with a buffer that each count changes and checks
	DMA     Load = "dma"     // reads the disk into its own pages; needs Options.Disk
	Net     Load = "net"     // echoes over the network card; needs Options.Net
	Alloc   Load = "alloc"   // takes and gives back memory
	Stress  Load = "stress"  // writes at random to StressPercent of memory
)

// Kernel is a kernel that hack/setup unpacked.
type Kernel string

const (
	KernelBookworm  Kernel = "kernel"           // Debian 12's, 6.1
	KernelBackports Kernel = "kernel-backports" // 6.12
)

// Linux is Debian's cloud kernel with an init of our own. It takes some seconds to boot under TCG.
type Linux struct {
	Loads  []Load // default Counter alone
	Kernel Kernel // default KernelBookworm

	BufferMiB     int           // of the counter, all of it read at every count; default 16
	GroupPages    int           // pages rewritten by each count; default 16
	Step          time.Duration // from count to count; default 100 ms
	WorkMiB       int           // of the area that Channel.Work writes; default 256
	StressPercent int           // default 25

	Append string // added to the kernel's command line
}

func (l Linux) withDefaults() Linux {
	if len(l.Loads) == 0 {
		l.Loads = []Load{Counter}
	}
	l.Kernel = orDefault(l.Kernel, KernelBookworm)
	l.BufferMiB = orDefault(l.BufferMiB, 16)
	l.GroupPages = orDefault(l.GroupPages, 16)
	l.Step = orDefault(l.Step, 100*time.Millisecond)
	l.WorkMiB = orDefault(l.WorkMiB, 256)
	l.StressPercent = orDefault(l.StressPercent, 25)
	return l
}

// Counter returns the counter's buffer as a function of the count, to compare the guest's hashes with.
func (l Linux) Counter() workload.Counter {
	l = l.withDefaults()
	group := uint64(l.GroupPages)
	return workload.Counter{Pages: uint64(l.BufferMiB) * MiB / workload.PageBytes / group * group, GroupPages: group, Seed: 1}
}

// commandLine is the kernel's. What stands before our own words makes the boot quick; errors are still printed.
func (l Linux) commandLine() string {
	loads := make([]string, len(l.Loads))
	for i, load := range l.Loads {
		loads[i] = string(load)
	}
	return strings.TrimSpace(fmt.Sprintf("console=ttyS0 quiet mitigations=off random.trust_cpu=on audit=0 apparmor=0 "+
		"vmckpt.load=%s vmckpt.buffer=%d vmckpt.group=%d vmckpt.step=%d vmckpt.work=%d vmckpt.stress=%d %s",
		strings.Join(loads, ","), l.BufferMiB, l.GroupPages, l.Step.Milliseconds(), l.WorkMiB, l.StressPercent, l.Append))
}

// files returns the paths of kernel and initramfs.
func (l Linux) files(ctx context.Context, cache string) (kernel, initramfs string, err error) {
	dir := filepath.Join(filepath.Dir(cache), string(l.Kernel))
	kernel = filepath.Join(dir, "vmlinuz")
	if _, err := os.Stat(kernel); errors.Is(err, os.ErrNotExist) {
		return "", "", &Unavailable{fmt.Sprintf("Debian's cloud kernel, %s (run hack/setup)", l.Kernel)}
	}
	initramfs, err = linux.Initramfs(ctx, cache, dir)
	return kernel, initramfs, err
}

func (l Linux) prepare(p *preparation) ([]string, error) {
	if p.options.Accel == KVM && !hardwareVirtualization() {
		return nil, &Unavailable{"hardware virtualization: a Linux guest does not boot under KVM without it"}
	}
	l = l.withDefaults()
	kernel, initramfs, err := l.files(p.ctx, p.cache)
	if err != nil {
		return nil, err
	}
	return []string{"-kernel", kernel, "-initrd", initramfs, "-append", l.commandLine()}, nil
}

// hardwareVirtualization reports whether the processor says that it has it. /dev/kvm may be there without.
func hardwareVirtualization() bool {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false
	}
	for field := range strings.FieldsSeq(string(info)) {
		if field == "vmx" || field == "svm" {
			return true
		}
	}
	return false
}
