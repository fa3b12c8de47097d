package image

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Compression is how the payload of a record is stored. The values are part of the format.
type Compression uint8

const (
	None Compression = 0
	Zstd Compression = 1 // Zstandard (RFC 8878), one frame, written at the fastest level
	S2   Compression = 2 // S2 block format, an extension of Snappy's
)

func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case Zstd:
		return "zstd"
	case S2:
		return "s2"
	}
	return fmt.Sprintf("compression %d", uint8(c))
}

// ParseCompression is the inverse of String.
func ParseCompression(name string) (Compression, error) {
	for _, c := range []Compression{None, Zstd, S2} {
		if c.String() == name {
			return c, nil
		}
	}
	return 0, fmt.Errorf("unknown compression %q (none, zstd or s2)", name)
}

// MarshalText writes the name, as manifests have it.
func (c Compression) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads the name.
func (c *Compression) UnmarshalText(text []byte) (err error) {
	*c, err = ParseCompression(string(text))
	return err
}

// compressor compresses one payload after the other, all work in the caller's goroutine. Not for concurrent use.
type compressor struct {
	how  Compression
	zstd *zstd.Encoder
}

func newCompressor(how Compression) (*compressor, error) {
	c := &compressor{how: how}
	if how != Zstd {
		return c, nil
	}
	var err error
	c.zstd, err = zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(frameRawBytes), // a frame of pages never looks further back
		zstd.WithEncoderCRC(false),         // every record has a tag
	)
	return c, err
}

// bound returns how long the output for n bytes of input can become before it is thrown away for not shrinking.
func bound(n int) int { return s2.MaxEncodedLen(n) + 64 }

// append compresses raw onto dst and returns what was used: None, with raw itself appended, where it does not shrink.
func (c *compressor) append(dst, raw []byte) ([]byte, Compression) {
	start := len(dst)
	switch c.how {
	case Zstd:
		dst = c.zstd.EncodeAll(raw, dst)
	case S2:
		if free := cap(dst) - start; free < s2.MaxEncodedLen(len(raw)) {
			dst = append(dst, make([]byte, s2.MaxEncodedLen(len(raw)))...)[:start]
		}
		out := s2.Encode(dst[start:start+s2.MaxEncodedLen(len(raw))], raw)
		dst = dst[:start+len(out)]
	}
	if c.how == None || len(dst)-start >= len(raw) {
		return append(dst[:start], raw...), None
	}
	return dst, c.how
}

// decompressor is the way back. Not for concurrent use.
type decompressor struct {
	zstd *zstd.Decoder // made when first needed
}

var errLength = errors.New("decompresses to another length than declared")

// decompress fills raw, all of it, from stored. The output never grows beyond raw, whatever stored says of itself.
func (d *decompressor) decompress(how Compression, raw, stored []byte) error {
	switch how {
	case None:
		if len(stored) != len(raw) {
			return errLength
		}
		copy(raw, stored)
		return nil
	case Zstd:
		if d.zstd == nil {
			dec, err := zstd.NewReader(nil,
				zstd.WithDecoderConcurrency(1),
				zstd.WithDecoderLowmem(true),
				zstd.WithDecodeAllCapLimit(true),
				zstd.WithDecoderMaxMemory(maxRawBytes),
			)
			if err != nil {
				return err
			}
			d.zstd = dec
		}
		out, err := d.zstd.DecodeAll(stored, raw[:0:len(raw)])
		if err != nil {
			return err
		}
		if len(out) != len(raw) {
			return errLength
		}
		if len(raw) > 0 && &out[0] != &raw[0] {
			copy(raw, out)
		}
		return nil
	case S2:
		if n, err := s2.DecodedLen(stored); err != nil {
			return err
		} else if n != len(raw) {
			return errLength
		}
		_, err := s2.Decode(raw, stored)
		return err
	}
	return fmt.Errorf("unknown compression %d", how)
}

func (d *decompressor) close() {
	if d.zstd != nil {
		d.zstd.Close()
		d.zstd = nil
	}
}
