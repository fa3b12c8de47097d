package main

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What is printed comes from others too: a volume's owner names files, a guest's owner machines and disks, QEMU says what it likes. Nothing of it
// may speak to the terminal, or reorder what stands on it.

// visible returns a text with all that a terminal would act upon written as JSON writes it, \u001b; line ends stay.
func visible(text string) string {
	if strings.IndexFunc(text, acting) < 0 && utf8.ValidString(text) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRuneInString(text[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i]) // 0x9b alone begins a command on terminals of 8 bits
		case acting(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
		i += n
	}
	return b.String()
}

// acting says whether a terminal takes a character for something other than text.
func acting(r rune) bool {
	return r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || unicode.In(r, unicode.Zl, unicode.Zp))
}

// oneLine is visible, line ends too: for what must not begin a line of its own.
func oneLine(text string) string { return strings.ReplaceAll(visible(text), "\n", `\u000a`) }

// visibleArgs makes what is to be formatted visible on one line; the format has the line ends.
func visibleArgs(args []any) []any {
	all := make([]any, len(args))
	for i, arg := range args {
		switch arg := arg.(type) {
		case string:
			all[i] = oneLine(arg)
		case error:
			all[i] = oneLine(arg.Error())
		case fmt.Stringer:
			all[i] = oneLine(arg.String())
		default:
			all[i] = arg
		}
	}
	return all
}

// answerWriter is standard output, which may be a full disk or a closed pipe. It keeps the first error, and writes nothing after it.
type answerWriter struct {
	io.Writer
	err error
}

func (w *answerWriter) Write(b []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.Writer.Write(b)
	w.err = err
	return n, err
}

// visibleWriter makes visible what is written to it, line ends kept: for encoded JSON, which escapes the first 32 characters by itself, and none
// of the other ones.
type visibleWriter struct{ w io.Writer }

func (v visibleWriter) Write(b []byte) (int, error) {
	if _, err := io.WriteString(v.w, visible(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}
