package image

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/zeebo/blake3"
)

// Keys are what a repository is opened with. The zero value is not a usable secret.
type Keys struct {
	// Secret is what every MAC, tag and page hash is keyed by. Whoever has it can make images that are believed.
	Secret [32]byte
	// Encryption, where set, is what new images are encrypted under, and what encrypted ones are read with.
	// Without it images are written plain: authenticated, but readable to whoever can read the volume.
	Encryption *[32]byte
}

// Format keeps keys out of logs and error messages, whatever the verb.
func (Keys) Format(f fmt.State, _ rune) { io.WriteString(f, "image.Keys{hidden}") }

// keyFileLimit bounds what is read of a key file.
const keyFileLimit = 4096

// NewKeyFile makes new random keys and writes them to a file that only its owner can read. It never replaces a file.
func NewKeyFile(path string, encrypted bool) (Keys, error) {
	var keys Keys
	rand.Read(keys.Secret[:])
	text := "# Keys of a VMckpt repository. Without this file no image in it can be read; keep it secret and keep a copy.\n" +
		"secret " + hex.EncodeToString(keys.Secret[:]) + "\n"
	if encrypted {
		keys.Encryption = new([32]byte)
		rand.Read(keys.Encryption[:])
		text += "encryption " + hex.EncodeToString(keys.Encryption[:]) + "\n"
	}
	if err := writeNew(path, []byte(text)); err != nil {
		return Keys{}, fmt.Errorf("write key file %s: %w", path, err)
	}
	return keys, nil
}

func writeNew(path string, content []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(path)
		}
	}()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Sync()
}

// notFoundWith keeps the system's message, and lets callers find ErrNotFound in it.
func notFoundWith(err error) error {
	if notFound(err) == ErrNotFound {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// ParseKeys reads the text of a key file: lines of a word and 64 hexadecimal digits, "secret" and, if images are to be
// encrypted, "encryption"; empty lines and lines that begin with # are passed over.
func ParseKeys(text []byte) (Keys, error) {
	if len(text) > keyFileLimit {
		return Keys{}, fmt.Errorf("longer than %d bytes", keyFileLimit)
	}
	var keys Keys
	seen := map[string]bool{}
	for i, line := range strings.Split(string(bytes.TrimSpace(text)), "\n") {
		word, digits, _ := strings.Cut(strings.TrimSpace(line), " ")
		if word == "" || strings.HasPrefix(word, "#") {
			continue
		}
		// The digits themselves never show in an error.
		value, err := hex.DecodeString(strings.TrimSpace(digits))
		if err != nil || len(value) != 32 {
			return Keys{}, fmt.Errorf("line %d: want 64 hexadecimal digits behind the word", i+1)
		}
		if seen[word] {
			return Keys{}, fmt.Errorf("line %d: the word stands twice", i+1)
		}
		seen[word] = true
		switch word {
		case "secret":
			keys.Secret = [32]byte(value)
		case "encryption":
			keys.Encryption = (*[32]byte)(value)
		default:
			return Keys{}, fmt.Errorf("line %d: unknown word", i+1)
		}
	}
	if !seen["secret"] {
		return Keys{}, errors.New("no line \"secret\"")
	}
	return keys, nil
}

// derived are the keys in use, each for one purpose, so that no output under one is of use under another.
type derived struct {
	mac   [32]byte // manifests
	tag   [32]byte // plain records, and file headers
	page  [32]byte // page hashes
	file  [32]byte // digests of files
	check [32]byte // key checks: what tells a wrong key from damage
	aead  *[32]byte
}

// The contexts are part of the format: BLAKE3's derive_key mode wants them unique in the world.
const (
	contextMAC   = "vmckpt.io 2026 image v1 manifest MAC"
	contextTag   = "vmckpt.io 2026 image v1 record tag"
	contextPage  = "vmckpt.io 2026 image v1 page hash"
	contextFile  = "vmckpt.io 2026 image v1 file digest"
	contextCheck = "vmckpt.io 2026 image v1 key check"
	contextAEAD  = "vmckpt.io 2026 image v1 record encryption"
)

func derive(keys Keys) derived {
	var d derived
	blake3.DeriveKey(contextMAC, keys.Secret[:], d.mac[:])
	blake3.DeriveKey(contextTag, keys.Secret[:], d.tag[:])
	blake3.DeriveKey(contextPage, keys.Secret[:], d.page[:])
	blake3.DeriveKey(contextFile, keys.Secret[:], d.file[:])
	blake3.DeriveKey(contextCheck, keys.Secret[:], d.check[:])
	if keys.Encryption != nil {
		// Of both, so that the encryption key alone does not make anything authentic.
		d.aead = new([32]byte)
		blake3.DeriveKey(contextAEAD, append(append([]byte{}, keys.Secret[:]...), keys.Encryption[:]...), d.aead[:])
	}
	return d
}

// keyedHash returns the first n bytes of BLAKE3 under key over the parts, one behind the other.
func keyedHash(key *[32]byte, n int, parts ...[]byte) []byte {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic(err) // only a key of another length than 32 is refused
	}
	for _, p := range parts {
		h.Write(p)
	}
	out := make([]byte, n)
	h.Digest().Read(out)
	return out
}

// secretCheck is stored beside each manifest's MAC: it depends on the secret and the repository alone.
func (d *derived) secretCheck(repository ID) []byte {
	return keyedHash(&d.check, keyCheckBytes, []byte("secret"), repository[:])
}

// encryptionCheck is stored in the manifest of an encrypted image.
func (d *derived) encryptionCheck(repository ID) []byte {
	return keyedHash(d.aead, keyCheckBytes, []byte("encryption"), repository[:])
}

const keyCheckBytes = 16
