package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmckpt/vmckpt/image/pageset"
)

// contentBytes is how much different content there is: guests are filled with it over and over. Nothing that is measured looks for equal
// pages further apart than a frame of 64 KiB.
const contentBytes = 64 << 20

// content is what guest memory is filled with, whole pages.
type content []byte

// programCode is the content that counts as ordinary: the Go toolchain's own programs, without their uniform pages.
func programCode(ctx context.Context) (content, error) {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("look for the Go toolchain: %w", err)
	}
	dir := strings.TrimSpace(string(root))
	var files []string
	for _, pattern := range []string{"bin/*", "pkg/tool/*/*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	slices.Sort(files)
	c := make(content, 0, contentBytes)
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		for page := range slices.Chunk(text, pageset.PageBytes) {
			if len(page) == pageset.PageBytes && len(c) < contentBytes && !slices.Equal(page[8:], page[:len(page)-8]) {
				c = append(c, page...)
			}
		}
	}
	if len(c) == 0 {
		return nil, fmt.Errorf("no programs beneath %s", dir)
	}
	return c, nil
}

// randomBytes is content that does not compress.
func randomBytes() content {
	c := make(content, contentBytes)
	rand.NewChaCha8([32]byte{1}).Read(c)
	return c
}

// uniform is content of one repeated word, which is not zero.
func uniform() content {
	return slices.Repeat(content{0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4}, contentBytes/8)
}
