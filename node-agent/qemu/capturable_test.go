package qemu

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRefusedTypes(t *testing.T) {
	for typename, want := range map[string]Code{
		"vfio-pci": CodeVFIO, "vfio-pci-nohotplug": CodeVFIO, "vfio-user-pci": CodeVFIO,
		"vhost-vdpa-device-pci": CodeVDPA, "vhost-user-fs-pci": CodeVhostUser, "vhost-user-blk-pci": CodeVhostUser,
		"virtio-mem-pci": CodeMemoryDevice, "pc-dimm": CodeMemoryDevice, "nvdimm": CodeMemoryDevice,
		"ivshmem-plain": CodeIvshmem, "x-pci-proxy-dev": CodeForeignMemory, "x-vfio-user-server": CodeForeignMemory, "pvrdma": CodeVFIO,
		"virtio-gpu-pci": "", "virtio-blk-pci": "", "vhost-vsock-pci": "", "nvme-ns": "", "pcie-root-port": "", "virtio-balloon-pci": "",
	} {
		var got Code
		if r := against(refusedDevices, "device", typename); len(r) > 0 {
			got = r[0].Code
		}
		if got != want {
			t.Errorf("%s: %q, want %q", typename, got, want)
		}
	}
}

func TestRefusedBlockDrivers(t *testing.T) {
	for driver, refused := range map[string]bool{
		"nvme": true, "nvme-io_uring": true, "virtio-blk-vfio-pci": true, "virtio-blk-vhost-vdpa": true, "virtio-blk-vhost-user": true,
		"file": false, "host_device": false, "raw": false, "qcow2": false, "nbd": false, "io_uring": false,
	} {
		if got := len(against(refusedBlockDrivers, "block driver", driver)) > 0; got != refused {
			t.Errorf("%s is refused: %v, want %v", driver, got, refused)
		}
	}
}

func TestNetdevTypes(t *testing.T) {
	text := "net: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33\r\n" +
		" \\ n: index=0,type=vhost-user,net=10.0.2.0\r\nhub 0\r\n \\ hub0port1: v: index=0,type=vhost-vdpa\r\n"
	var got []string
	for _, f := range netdevType.FindAllStringSubmatch(text, -1) {
		got = append(got, f[1])
	}
	if d := cmp.Diff([]string{"nic", "vhost-user", "vhost-vdpa"}, got); d != "" {
		t.Error(d)
	}
}

func TestCapturableRealQEMU(t *testing.T) {
	shared := fmt.Sprintf("/dev/shm/vmckpt-test-%d", os.Getpid())
	t.Cleanup(func() { os.Remove(shared) })
	for name, c := range map[string]struct {
		args []string
		want []Code
	}{
		"ordinary":   {[]string{"-device", "virtio-balloon-pci", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"}, nil},
		"never ran":  {[]string{"-S"}, []Code{CodeRunState}},
		"DIMM":       {[]string{"-m", "64,slots=1,maxmem=256M", "-object", "memory-backend-ram,id=d,size=64M", "-device", "pc-dimm,memdev=d"}, []Code{CodeMemoryDevice}},
		"virtio-mem": {[]string{"-m", "64,maxmem=256M", "-object", "memory-backend-ram,id=d,size=64M", "-device", "virtio-mem-pci,memdev=d"}, []Code{CodeMemoryDevice}},
		"ivshmem":    {[]string{"-object", "memory-backend-ram,id=d,size=1M,share=on", "-device", "ivshmem-plain,memdev=d"}, []Code{CodeIvshmem, CodeMigrationBlock}},
		"blocked":    {[]string{"-device", "nvme,serial=x"}, []Code{CodeMigrationBlock}}, // its state cannot be saved
		"shared": {[]string{"-object", "memory-backend-file,id=s,size=64M,share=on,mem-path=" + shared, "-machine", "memory-backend=s"},
			[]Code{CodeSharedWriter}},
	} {
		t.Run(name, func(t *testing.T) {
			forEachQEMU(t, func(t *testing.T, e emulator) {
				args := append([]string{"-machine", "q35", "-m", "64"}, c.args...)
				g := e.start(t, nil, args...)
				m, p := g.dial(t), g.find(t)
				if name == "shared" {
					e.start(t, nil, args...).dial(t) // maps the same file
				}
				layout, err := ReadLayout(t.Context(), m, p)
				if err != nil {
					t.Fatal(err)
				}
				err = Capturable(t.Context(), m, p, layout)
				var refused *RefusedError
				errors.As(err, &refused)
				var got []Code
				if refused != nil {
					for _, r := range refused.Reasons {
						got = append(got, r.Code)
					}
				} else if err != nil {
					t.Fatal(err)
				}
				slices.Sort(got)
				if d := cmp.Diff(c.want, slices.Compact(got)); d != "" {
					t.Errorf("%v\n%s", err, d)
				}
				t.Log(err)
				if err := m.Execute(t.Context(), "stop", nil, nil); err != nil {
					t.Fatal(err)
				}
				if name == "ordinary" {
					if err := Capturable(t.Context(), m, p, layout); err != nil {
						t.Errorf("paused by its owner: %v", err)
					}
				}
				if name == "never ran" {
					if err := Supported(t.Context(), m, p, layout); err != nil {
						t.Errorf("to be loaded into: %v", err)
					}
				}
			})
		})
	}
}
