package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/durable"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// currentEntry is the entry of the Secret that names the one which new images are written with.
const currentEntry = "current"

// KeyRing has the keys from a Secret in the operator's namespace. Each entry but "current" is the text of a key file; "current" names the one
// that new images are written with. To rotate, an entry is added and named; the old one stays as long as its images are to be read.
type KeyRing struct {
	Reader client.Reader // not cached: a key that was just changed counts
	Secret types.NamespacedName

	// Dir, in memory and this process's alone, is where workers find them as files.
	Dir string

	mu sync.Mutex // over Dir
}

// keyFiles are the paths of the key files: the current one, and all with it in front.
type keyFiles struct {
	current string
	all     []string
}

// files reads the Secret and writes its keys to files. Those that are not in it any more are removed.
func (k *KeyRing) files(ctx context.Context) (keyFiles, error) {
	fail := func(err error) (keyFiles, error) {
		return keyFiles{}, &jobs.KeyError{Err: fmt.Errorf("keys in Secret %v: %w", k.Secret, err)}
	}
	var secret corev1.Secret
	if err := k.Reader.Get(ctx, k.Secret, &secret); err != nil {
		return fail(err)
	}
	current := strings.TrimSpace(string(secret.Data[currentEntry]))
	if _, ok := secret.Data[current]; !ok || current == currentEntry {
		return fail(fmt.Errorf("entry %q says %q, and there is no such entry", currentEntry, current))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := os.MkdirAll(k.Dir, 0o700); err != nil {
		return fail(err)
	}
	dir, err := os.OpenRoot(k.Dir)
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	files := keyFiles{}
	var kept []string
	for entry, text := range secret.Data {
		if entry == currentEntry {
			continue
		}
		if _, err := image.ParseKeys(text); err != nil {
			return fail(fmt.Errorf("entry %q: %w", entry, err))
		}
		// By the content: a worker that has just been started with a path finds what was meant.
		sum := sha256.Sum256(text)
		name := hex.EncodeToString(sum[:16]) + ".key"
		if _, err := dir.Stat(name); err != nil {
			if err := durable.WriteFile(dir, name, text); err != nil {
				return fail(err)
			}
		}
		kept = append(kept, name)
		path := filepath.Join(k.Dir, name)
		if entry == current {
			files.current = path
			files.all = slices.Insert(files.all, 0, path)
		} else {
			files.all = append(files.all, path)
		}
	}
	return files, k.sweep(kept)
}

// sweep removes the files of keys that are gone from the Secret.
func (k *KeyRing) sweep(kept []string) error {
	entries, err := os.ReadDir(k.Dir)
	if err != nil {
		return err
	}
	var failed []error
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".key") && !slices.Contains(kept, e.Name()) {
			failed = append(failed, os.Remove(filepath.Join(k.Dir, e.Name())))
		}
	}
	return errors.Join(failed...)
}

// tryKeys does something with one key after the other until one fits. It returns the key file that did.
func tryKeys[T any](files keyFiles, do func(keyFile string) (T, error)) (result T, keyFile string, err error) {
	for _, keyFile = range files.all {
		if result, err = do(keyFile); jobs.CodeOf(err) != jobs.CodeWrongKey {
			return result, keyFile, err
		}
	}
	return result, "", err
}
