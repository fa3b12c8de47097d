package image

import (
	"encoding/hex"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// DocumentedVectors reads the test vectors that docs/image-format.md gives: hexadecimal digits by what they are.
func DocumentedVectors(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../docs/image-format.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## Test vectors\n")
	if !found {
		t.Fatal("the document has no test vectors")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	vectors := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (.+?) \\| `([0-9a-f]+)` \\|$").FindAllStringSubmatch(section, -1) {
		vectors[row[1]] = row[2]
	}
	return vectors
}

// VectorInput is what the document's vectors are made of.
func VectorInput() (secret, encryption [32]byte, repository, id [16]byte, page []byte) {
	for i := range secret {
		secret[i], encryption[i] = byte(i), byte(255-i)
	}
	for i := range id {
		repository[i], id[i] = byte(i), byte(0xf0+i)
	}
	page = make([]byte, 4096)
	for i := range page {
		page[i] = byte(i % 251)
	}
	return secret, encryption, repository, id, page
}

// TestVectors holds the package against the document's test vectors; see TestStrangerVectors for the reader that knows the document
// alone.
func TestVectors(t *testing.T) {
	secret, encryption, repository, id, page := VectorInput()
	keys := derive(Keys{Secret: secret, Encryption: &encryption})
	got := map[string]string{}
	note := func(what string, value []byte) { got[what] = hex.EncodeToString(value) }
	note("K<sub>mac</sub>", keys.mac[:])
	note("K<sub>tag</sub>", keys.tag[:])
	note("K<sub>page</sub>", keys.page[:])
	note("K<sub>file</sub>", keys.file[:])
	note("K<sub>check</sub>", keys.check[:])
	note("K<sub>aead</sub>", keys.aead[:])
	note("secret check", keys.secretCheck(repository))
	note("encryption check", keys.encryptionCheck(repository))
	note("MAC of a manifest of the bytes `{}`", keyedHash(&keys.mac, macBytes, []byte("{}")))
	hash := keys.hashPage(page)
	note("hash of the page", hash[:])
	digest := keys.newFileDigest()
	digest.Write(page)
	note("digest of a file that is the page, and nothing else", digest.Sum(nil))
	for _, encrypted := range []bool{false, true} {
		s, err := newSealer(&keys, pagesFile, id, encrypted)
		if err != nil {
			t.Fatal(err)
		}
		record := make([]byte, recordOverhead+len(page))
		recordHeader{kind: frameRecord, items: 1, raw: 4096, stored: 4096}.encode(record)
		copy(record[recordHeaderBytes:], page)
		s.seal(record, fileHeaderBytes)
		how := "plain"
		if encrypted {
			how = "encrypted"
			note("encrypted: first 16 bytes of the record's payload", record[recordHeaderBytes:][:16])
		}
		note(how+": tag of the file header", s.fileHeader(repository)[fileHeaderBytes-tagBytes:])
		note(how+": tag of the record", record[len(record)-tagBytes:])
	}
	if diff := cmp.Diff(DocumentedVectors(t), got); diff != "" {
		t.Errorf("(-document +package):\n%s", diff)
	}
}
