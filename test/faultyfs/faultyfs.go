package faultyfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Fault is how a volume fails all that changes it.
type Fault string

const (
	None     Fault = ""
	EIO      Fault = "broken"
	Full     Fault = "full"
	ReadOnly Fault = "read-only"
	Slow     Fault = "slow"  // SlowTime for each change
	Hangs    Fault = "hangs" // until it is told otherwise
)

// SlowTime is what each change takes on a slow volume.
const SlowTime = 3 * time.Millisecond

// FS is a mounted file system. A process of its own serves it: whoever works on a file system that it serves itself stands still for ever once its
// runtime stops all threads while one of them waits for the file system.
type FS struct {
	Dir string // where it is mounted

	t      testing.TB
	server *exec.Cmd
	orders *json.Encoder
	states *json.Decoder
}

// state is what the server answers each fault that it is to set with.
type state struct {
	Met int // changes that met a fault so far
	Err string
}

// serverVariable marks a process as the server; its value is the directory to mount at and the one beneath it.
const serverVariable = "VMCKPT_TEST_FAULTYFS"

// Main serves a file system if this process was started for that, and does not return then. TestMain of whatever mounts one calls it first.
func Main() {
	dirs, ok := os.LookupEnv(serverVariable)
	if !ok {
		return
	}
	answers := json.NewEncoder(os.Stdout)
	dir, backing, _ := strings.Cut(dirs, ":")
	v := &volume{change: make(chan struct{})}
	server, err := v.mount(dir, backing)
	if err != nil {
		answers.Encode(state{Err: err.Error()}) //nolint:errcheck // the test may be gone
		os.Exit(1)
	}
	answers.Encode(state{}) //nolint:errcheck // as above
	orders := json.NewDecoder(os.Stdin)
	for {
		var fault Fault
		if orders.Decode(&fault) != nil { // the test is over
			v.set(None)
			for server.Unmount() != nil {
				time.Sleep(10 * time.Millisecond)
			}
			os.Exit(0)
		}
		answers.Encode(state{Met: v.set(fault)}) //nolint:errcheck // as above
	}
}

// Mount mounts a new, empty file system, until the test ends. It skips the test where FUSE cannot be had.
func Mount(t testing.TB) *FS {
	t.Helper()
	f := &FS{Dir: t.TempDir(), t: t, server: exec.Command("/proc/self/exe")}
	f.server.Env = append(os.Environ(), serverVariable+"="+f.Dir+":"+t.TempDir())
	f.server.Stderr = os.Stderr
	stdin, err := f.server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := f.server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.server.Start(); err != nil {
		t.Fatal(err)
	}
	f.orders, f.states = json.NewEncoder(stdin), json.NewDecoder(stdout)
	var s state
	if err := f.states.Decode(&s); err != nil || s.Err != "" {
		stdin.Close()
		t.Skipf("FUSE cannot be had here: %s %v", s.Err, errors.Join(err, f.server.Wait()))
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := f.server.Wait(); err != nil {
			t.Errorf("the server of %s: %v", f.Dir, err)
		}
	})
	return f
}

// Set makes the volume fail from now on, or work again. What hangs goes on. It returns how many changes had met a fault by then.
func (f *FS) Set(fault Fault) (met int) {
	f.t.Helper()
	var s state
	if err := errors.Join(f.orders.Encode(fault), f.states.Decode(&s)); err != nil {
		f.t.Fatalf("make the volume %q: %v", fault, err)
	}
	return s.Met
}

// volume is what the server serves.
type volume struct {
	mu     sync.Mutex
	fault  Fault
	change chan struct{} // closed when the fault becomes another
	met    int           // changes that met a fault
}

func (v *volume) mount(dir, backing string) (*fuse.Server, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(backing, &st); err != nil {
		return nil, err
	}
	root := &fs.LoopbackRoot{Path: backing, Dev: uint64(st.Dev)}
	root.NewNode = func(data *fs.LoopbackRoot, _ *fs.Inode, _ string, _ *syscall.Stat_t) fs.InodeEmbedder {
		return &node{LoopbackNode: fs.LoopbackNode{RootData: data}, volume: v}
	}
	node := &node{LoopbackNode: fs.LoopbackNode{RootData: root}, volume: v}
	root.RootNode = node
	return fs.Mount(dir, node, &fs.Options{MountOptions: fuse.MountOptions{DirectMount: true, FsName: "faultyfs"}})
}

// set sets the fault and returns how many changes had met one by then.
func (v *volume) set(fault Fault) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fault = fault
	close(v.change)
	v.change = make(chan struct{})
	return v.met
}

// meet is called before each change, and is its error.
func (v *volume) meet(ctx context.Context) syscall.Errno {
	for counted := false; ; counted = true {
		v.mu.Lock()
		fault, change := v.fault, v.change
		if fault != None && !counted {
			v.met++
		}
		v.mu.Unlock()
		switch fault {
		case None:
			return 0
		case EIO:
			return syscall.EIO
		case Full:
			return syscall.ENOSPC
		case ReadOnly:
			return syscall.EROFS
		case Slow:
			time.Sleep(SlowTime)
			return 0
		case Hangs:
			select {
			case <-change:
			case <-ctx.Done():
				return syscall.EINTR
			}
		default:
			panic(fmt.Sprintf("faultyfs: fault %q", fault))
		}
	}
}

// node is a file or a directory.
type node struct {
	fs.LoopbackNode
	volume *volume
}

// loopbackFile is what a file of [fs.LoopbackNode] can do.
type loopbackFile interface {
	fs.FileReader
	fs.FileWriter
	fs.FileReleaser
	fs.FileFlusher
	fs.FileFsyncer
	fs.FileGetlker
	fs.FileSetlker
	fs.FileSetlkwer
	fs.FileGetattrer
	fs.FileSetattrer
	fs.FileLseeker
	fs.FileAllocater
}

// file is an open file. It hides that the kernel could go past us to the file beneath.
type file struct{ loopbackFile }

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, flags, errno := n.LoopbackNode.Open(ctx, flags)
	if errno != 0 {
		return nil, 0, errno
	}
	return &file{f.(loopbackFile)}, flags, 0
}

func (n *node) Write(ctx context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if errno := n.volume.meet(ctx); errno != 0 {
		return 0, errno
	}
	return f.(fs.FileWriter).Write(ctx, data, off)
}

func (n *node) Fsync(ctx context.Context, f fs.FileHandle, flags uint32) syscall.Errno {
	if errno := n.volume.meet(ctx); errno != 0 {
		return errno
	}
	if f == nil { // a directory
		return 0
	}
	return f.(fs.FileFsyncer).Fsync(ctx, flags)
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.volume.meet(ctx); errno != 0 {
		return nil, nil, 0, errno
	}
	inode, f, flags, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	return inode, &file{f.(loopbackFile)}, flags, 0
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.volume.meet(ctx); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Mkdir(ctx, name, mode, out)
}

func (n *node) Rename(ctx context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if errno := n.volume.meet(ctx); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Rename(ctx, name, parent, newName, flags)
}

func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.volume.meet(ctx); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Link(ctx, target, name, out)
}
