package linux

import (
	"fmt"
	"io"
)

// cpioWriter writes an archive in the format that the kernel unpacks (Linux, Documentation/driver-api/early-userspace/
// buffer-format.rst: "newc"). The first error stays.
type cpioWriter struct {
	w     io.Writer
	off   int
	inode int
	err   error
}

const (
	modeDirectory = 0o040000
	modeCharacter = 0o020000
	modeFile      = 0o100000
)

func (c *cpioWriter) directory(name string) { c.entry(name, modeDirectory|0o755, 0, 0, nil) }

func (c *cpioWriter) characterDevice(name string, major, minor int) {
	c.entry(name, modeCharacter|0o600, major, minor, nil)
}

func (c *cpioWriter) file(name string, permissions int, content []byte) {
	c.entry(name, modeFile|permissions, 0, 0, content)
}

func (c *cpioWriter) entry(name string, mode, major, minor int, content []byte) {
	c.inode++
	// Magic; then inode, mode, uid, gid, links, time, size, device (2), device that it is (2), length of name, checksum.
	c.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0))
	c.write(append([]byte(name), 0))
	c.align()
	c.write(content)
	c.align()
}

func (c *cpioWriter) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.err
}

// align pads to a multiple of 4 bytes.
func (c *cpioWriter) align() { c.write(make([]byte, (4-c.off%4)%4)) }

func (c *cpioWriter) write(b []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(b)
	c.off += n
	c.err = err
}
