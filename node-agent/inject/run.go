package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// stopAndRun takes the thread, runs the program and lets the thread go, whatever happens.
func stopAndRun(req request, steps *steps) (Report, error) {
	own, err := prepare(req.Program)
	if err != nil {
		return Report{}, err
	}
	defer own.close()
	status, err := readStatus(req.TID)
	if err != nil {
		return Report{}, err
	}
	t, err := seize(req.PID, req.TID, status.seccomp, steps)
	if err != nil {
		return Report{}, err
	}
	// Traced, its id cannot pass to another process any more.
	if start, err := startTime(req.PID); err != nil || start != req.StartTime {
		return Report{}, fmt.Errorf("%w: its id belongs to another process", ErrGone)
	}
	begin := time.Now()
	opened, err := runStopped(t, req, own)
	detachErr := t.detach()
	report := Report{Stop: time.Since(begin)}
	if err != nil {
		return report, err
	}
	if errors.Is(detachErr, unix.ESRCH) {
		return report, ErrGone
	}
	for _, o := range opened {
		if o.open && !o.file.known() {
			if o.file, err = Identify(req.PID, o.file.FD); err != nil {
				return report, gone(err)
			}
		}
		report.Files = append(report.Files, o.file)
		report.Addresses = append(report.Addresses, o.address)
		report.Slots = append(report.Slots, o.slots...)
	}
	return report, nil
}

func (f RemoteFile) known() bool { return f.Link != "" }

// result is what one operation left: a file opened, or the one closed.
type result struct {
	file    RemoteFile
	open    bool
	address uint64 // of memory mapped
	slots   []MemorySlot
}

// runStopped runs the program's operations; after a failure it closes what they had opened. It returns errMissed itself
// if, and only if, no operation was begun.
func runStopped(t *tracee, req request, own *ownFiles) ([]result, error) {
	if err := t.interrupt(); err != nil {
		return nil, err
	}
	if err := t.toEntry(); err != nil {
		return nil, err
	}
	var done []result
	for _, op := range req.Program {
		r, err := t.run(op, req.PID, own)
		if err == nil {
			done = append(done, r)
			continue
		}
		err = fmt.Errorf("%s: %w", op.Kind, err)
		for _, r := range done {
			if r.open {
				err = errors.Join(err, t.close(r.file.FD))
			}
		}
		return nil, err
	}
	return done, nil
}

// run executes one operation.
func (t *tracee) run(op Operation, pid int, own *ownFiles) (result, error) {
	var fd int
	var err error
	switch op.Kind {
	case kindUserfaultfd:
		fd, err = t.openUserfaultfd()
	case kindSyncUserfaultfd:
		fd, err = t.openSyncUserfaultfd(pid, own.userfaultfd)
	case kindPipe:
		fd, err = t.openPipe()
	case kindMemfd:
		fd, err = t.openMemfd(op.Name)
	case kindClose:
		if err = op.File.Check(pid); err == nil {
			err = t.close(op.File.FD)
		}
		return result{file: op.File}, err
	case kindSharedMemory:
		fd, address, err := t.openSharedMemory(op.Name, op.Bytes)
		return result{file: RemoteFile{FD: fd}, open: true, address: address}, err
	case kindUnmap:
		return result{file: op.File}, t.unmap(pid, op.File, op.Address, op.Bytes)
	case kindLock, kindUnlock, kindMerge, kindDoNotMerge:
		return result{}, t.runPages(op)
	case kindFindSlots, kindReadLogs, kindClearLogs, kindRefillLogs, kindStopLogs:
		slots, err := t.runKVM(op, pid)
		return result{file: op.File, slots: slots}, err
	default:
		err = fmt.Errorf("unknown operation %q", op.Kind)
	}
	return result{file: RemoteFile{FD: fd}, open: true}, err
}

func (t *tracee) close(fd int) error {
	_, err := t.call("close", unix.SYS_CLOSE, uint64(fd))
	return err
}

// userModeOnly is UFFD_USER_MODE_ONLY, include/uapi/linux/userfaultfd.h.
const userModeOnly = 1

func (t *tracee) openUserfaultfd() (int, error) {
	fd, err := t.call("userfaultfd", unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly)
	return int(fd), err
}

// openPipe makes a pipe and closes its read end.
func (t *tracee) openPipe() (int, error) {
	ends, err := t.withScratch(nil, func(address uint64) error {
		_, err := t.call("pipe2", unix.SYS_PIPE2, address, unix.O_CLOEXEC)
		return err
	})
	if err != nil {
		return 0, err
	}
	read, write := littleEndian32(ends, 0), littleEndian32(ends, 4)
	if err := t.close(read); err != nil {
		return 0, errors.Join(err, t.close(write))
	}
	return write, nil
}

// openMemfd makes a memory file. It is never to be executed, where the kernel can be told so (Linux 6.3), since a node
// may forbid the others (vm.memfd_noexec).
func (t *tracee) openMemfd(name string) (int, error) {
	const longestName = 249 // memfd_create(2)
	if len(name) > longestName {
		return 0, fmt.Errorf("memory file's name of %d bytes", len(name))
	}
	text := func(uint64) []byte { return append([]byte(name), 0) }
	var fd uint64
	create := func(flags uint64) error {
		_, err := t.withScratch(text, func(address uint64) error {
			var err error
			fd, err = t.call("memfd_create", unix.SYS_MEMFD_CREATE, address, flags)
			return err
		})
		return err
	}
	err := create(unix.MFD_CLOEXEC | unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		err = create(unix.MFD_CLOEXEC)
	}
	return int(fd), err
}

// ioctlNewUserfaultfd is USERFAULTFD_IOC_NEW, include/uapi/linux/userfaultfd.h: _IO(0xAA, 0x00).
const ioctlNewUserfaultfd = 0xaa00

// openSyncUserfaultfd hands the open /dev/userfaultfd into the process, over a socket pair made there, and has a
// userfaultfd made from it. What it took on the way is closed again.
func (t *tracee) openSyncUserfaultfd(pid int, device int) (fd int, err error) {
	pair, err := t.withScratch(nil, func(address uint64) error {
		_, err := t.call("socketpair", unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0, address)
		return err
	})
	if err != nil {
		return 0, err
	}
	ours, theirs := littleEndian32(pair, 0), littleEndian32(pair, 4)
	temporary := []int{ours, theirs}
	defer func() {
		for _, end := range temporary {
			err = errors.Join(err, t.close(end))
		}
	}()
	if err := sendDescriptor(pid, ours, device); err != nil {
		return 0, fmt.Errorf("send /dev/userfaultfd into the process: %w", err)
	}
	received, err := t.receiveDescriptor(theirs)
	if err != nil {
		return 0, err
	}
	temporary = append(temporary, received)
	made, err := t.call("ioctl(USERFAULTFD_IOC_NEW)", unix.SYS_IOCTL, uint64(received), ioctlNewUserfaultfd, unix.O_CLOEXEC|unix.O_NONBLOCK)
	return int(made), err
}

// sendDescriptor sends our descriptor through a socket that is open as remote in the process.
func sendDescriptor(pid, remote, descriptor int) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	socket, err := unix.PidfdGetfd(pidfd, remote, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(descriptor), nil, unix.MSG_DONTWAIT)
}

// receiveDescriptor has the process receive the one descriptor that waits in its socket. The scratch memory holds, one
// after the other, struct msghdr (include/linux/socket.h), one struct iovec, one control message with one descriptor,
// and the byte of data.
func (t *tracee) receiveDescriptor(socket int) (int, error) {
	const (
		messageBytes = 56
		vectorBytes  = 16
		headerBytes  = 16 // CMSG_LEN(0), the descriptor behind it
		controlBytes = 24 // CMSG_SPACE(sizeof(int))

		vectorAt  = messageBytes
		controlAt = vectorAt + vectorBytes
		dataAt    = controlAt + controlBytes
	)
	message := func(base uint64) []byte {
		var b []byte
		for _, word := range []uint64{
			0, 0, base + vectorAt, 1, base + controlAt, controlBytes, 0, // name, its length, iovec, its length, control, its length, flags
			base + dataAt, 1, // iov_base, iov_len
		} {
			b = binary.LittleEndian.AppendUint64(b, word)
		}
		return b
	}
	after, err := t.withScratch(message, func(address uint64) error {
		_, err := t.call("recvmsg", unix.SYS_RECVMSG, uint64(socket), address, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return 0, err
	}
	length := binary.LittleEndian.Uint64(after[controlAt:])
	level, kind := littleEndian32(after, controlAt+8), littleEndian32(after, controlAt+12)
	if length != headerBytes+4 || level != unix.SOL_SOCKET || kind != unix.SCM_RIGHTS {
		return 0, fmt.Errorf("injected recvmsg: no descriptor came (a security module may forbid it)")
	}
	return littleEndian32(after, controlAt+headerBytes), nil
}

// ownFiles are files that the helper opens before the stop.
type ownFiles struct{ userfaultfd int } // -1: not needed

func prepare(program Program) (*ownFiles, error) {
	own := &ownFiles{userfaultfd: -1}
	for _, op := range program {
		if op.Kind != kindSyncUserfaultfd || own.userfaultfd >= 0 {
			continue
		}
		fd, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open /dev/userfaultfd: %w", err)
		}
		own.userfaultfd = fd
	}
	return own, nil
}

func (o *ownFiles) close() {
	if o.userfaultfd >= 0 {
		unix.Close(o.userfaultfd)
	}
}
