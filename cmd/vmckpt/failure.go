package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

// codeUsage is the code of what was typed wrong. It is this program's own: workers are never asked so.
const codeUsage jobs.Code = "usage"

// adviceError is an error with a hint of its own, where its code's does not fit.
type adviceError struct {
	error
	hint string
}

func (e *adviceError) Unwrap() error { return e.error }

// usageError is an error in what was typed.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// The exit codes. Scripts rely on them.
const (
	exitUnexpected  = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4
	exitDamaged     = 5
	exitNoSpace     = 6
	exitBusy        = 7
	exitLost        = 8
	exitPaused      = 9
	exitInterrupted = 130 // as shells have it for SIGINT
)

// codeOf returns the code of an error.
func codeOf(err error) jobs.Code {
	var usage *usageError
	if errors.As(err, &usage) {
		return codeUsage
	}
	return jobs.CodeOf(err)
}

// exitAndHint says how the program ends on an error, and what its user can do about it; there may be nothing to say.
func exitAndHint(code jobs.Code) (exit int, hint string) {
	switch code {
	case codeUsage:
		return exitUsage, "`vmckpt --help` shows how it is called"
	case jobs.CodeNoVM:
		return exitNotFound, "name a QEMU that runs on this host: by its guest name (-name), --uuid or --pid; seeing other users' machines needs root"
	case jobs.CodeAmbiguous:
		return exitUsage, "name it by --uuid or --pid"
	case jobs.CodeUnreachable:
		return exitNotFound, "name a QMP socket that no other client holds with --monitor, or libvirt's with --libvirt"
	case jobs.CodeNotFound:
		return exitNotFound, "`vmckpt list` shows the images there are"
	case jobs.CodeExists:
		return exitUsage, "choose another name"
	case jobs.CodeKey:
		return exitUsage, "--key wants a file that `vmckpt init` made, outside the repository, this user's or root's, and readable by its owner alone"
	case jobs.CodeRefused:
		return exitRefused, "nothing was touched; the message names each reason: change the machine so that it has none of them"
	case jobs.CodeState:
		return exitRefused, "nothing was touched; try again when the VM is in another state (restore stops a running VM with --in-place only)"
	case jobs.CodeUnsteady:
		return exitRefused, "the VM goes on as before; try again when nothing else stops or resumes it and the guest writes less, or allow more: --hold-bound for one hold, --pause-bound for a guest that writes fast, --write-bound for guarded memory"
	case jobs.CodeMismatch:
		return exitRefused, "nothing was touched; start a QEMU like the recorded one (`vmckpt show IMAGE --output json`, machine) and restore into that"
	case jobs.CodeParent:
		return exitRefused, "take a base with --mode full, or let --mode auto decide"
	case jobs.CodeDamaged:
		return exitDamaged, "restore from another image (`vmckpt verify` checks them all); the next capture with --mode full does not need this one"
	case jobs.CodeWrongKey:
		return exitDamaged, "use the key file that the image was written with"
	case jobs.CodeNoSpace:
		return exitNoSpace, "make room: `vmckpt delete` images that are not needed, `vmckpt sweep --older-than 0s` removes leftovers; nothing was lost, and a VM under capture runs on"
	case jobs.CodeBusy:
		return exitBusy, "wait for the other one to end, and try again"
	case jobs.CodeNotPermitted:
		return exitRefused, "root is needed: to reach the monitor of another user's QEMU, and to read and write its memory (CAP_SYS_PTRACE, CAP_DAC_OVERRIDE)"
	case jobs.CodeNoAccess:
		return exitRefused, "look at the owner and the mode of what the message names (in the repository, or this host's --record-dir), and whether its volume is mounted read-only"
	case jobs.CodeLost:
		return exitLost, "do not let the VM run: repeat the restore, of this image or another, or end the QEMU"
	case jobs.CodeStopped:
		return exitPaused, "nothing was written to the VM, and it stands paused: unless it has migrated or shut down meanwhile, continue it (`cont`, `virsh resume`)"
	case jobs.CodeNotRunning:
		return exitPaused, "the restore is complete: find out why the VM does not run (`info status`, `virsh domstate --reason`), and continue it (`cont`, `virsh resume`)"
	case jobs.CodeInterrupted:
		return exitInterrupted, ""
	case jobs.CodeDied:
		return exitUnexpected, "a VM under capture was let go by the kernel and runs on (`vmckpt sweep --older-than 0s` removes what was begun); one under restore was not written to, and goes on as it was"
	}
	return exitUnexpected, ""
}

// failureJSON is an error for scripts.
type failureJSON struct {
	Code    jobs.Code   `json:"code"`
	Message string      `json:"message"`
	Hint    string      `json:"hint,omitempty"`
	Damage  *damageJSON `json:"damage,omitempty"`
}

// damageJSON says where an image is damaged.
type damageJSON struct {
	Image  string `json:"image"`
	File   string `json:"file"`
	Offset int64  `json:"offset"` // -1 where it cannot be told
}

// hintOf says what can be done about an error, where more is known of it than its code; else it returns the code's hint.
func hintOf(err error) string {
	var advice *adviceError
	var notEmpty *image.NotEmptyError
	var noRepository *jobs.NoRepositoryError
	var key *jobs.KeyError
	switch {
	case errors.As(err, &advice):
		return advice.hint
	case errors.As(err, &noRepository):
		return "name the repository's directory with --repo or " + repositoryVariable + "; `vmckpt init` makes a new one"
	case errors.As(err, &key) && errors.Is(err, image.ErrNotFound):
		return "name the repository's key file with --key or " + keyVariable + "; `vmckpt init` makes one for a new repository"
	case errors.As(err, &notEmpty):
		return "nothing was made; name an empty or a new directory with --repo"
	case errors.Is(err, image.ErrNotDirectory):
		return "name a directory with --repo"
	case errors.Is(err, image.ErrNotImage):
		return "nothing was removed; who put it there may remove it (`rm`)"
	case errors.Is(err, errRepositoryThere):
		return "use it as it is (`vmckpt list`), or name another directory with --repo"
	}
	_, hint := exitAndHint(codeOf(err))
	return hint
}

func describe(err error) *failureJSON {
	f := &failureJSON{Code: codeOf(err), Message: messageOf(err), Hint: hintOf(err)}
	var damage *image.DamageError
	if errors.As(err, &damage) {
		f.Damage = &damageJSON{Image: damage.Image, File: damage.File, Offset: damage.Offset}
	}
	return f
}

// messageOf returns the text of an error, without Go's own words for an interruption.
func messageOf(err error) string {
	text := err.Error()
	if codeOf(err) != jobs.CodeInterrupted {
		return text
	}
	return strings.ReplaceAll(text, context.Canceled.Error(), supervise.ErrUnwanted.Error())
}

// endedMeanwhile gives an error its hint where a machine that had been found has ended since: there is nothing wrong with its name.
func endedMeanwhile(err error, left string) error {
	if codeOf(err) != jobs.CodeNoVM {
		return err
	}
	return &adviceError{err, "the QEMU has ended in the middle: see why (its log), and start it again; " + left}
}

// reported is an error that was told of already, and that the command's answer has: verify has a line for each image.
type reported struct{ error }

func (e *reported) Unwrap() error { return e.error }

// fail tells of an error and returns the exit code.
func (p *program) fail(err error) int {
	f := describe(err)
	exit, _ := exitAndHint(f.Code)
	var advice *adviceError
	if f.Code == codeUsage && p.called != "" && !errors.As(err, &advice) {
		f.Hint = fmt.Sprintf("`%s --help` shows how it is called", p.called)
	}
	var told *reported
	if !errors.As(err, &told) {
		p.complain(err)
		if p.output == outputJSON {
			p.encode(struct {
				Error *failureJSON `json:"error"`
			}{f})
		}
	}
	if f.Hint != "" {
		fmt.Fprintf(p.stderr, "hint: %s\n", f.Hint)
	}
	return exit
}

// complain tells people of an error. Several that are joined stand on lines of their own.
func (p *program) complain(err error) {
	if codeOf(err) == jobs.CodeInterrupted {
		// Not all of it may be about the interruption.
		fmt.Fprintf(p.stderr, "interrupted: %s\n", indent(visible(messageOf(err)), len("interrupted: ")))
		return
	}
	fmt.Fprintf(p.stderr, "error: %s\n", indent(visible(err.Error()), len("error: ")))
}

// indent puts the lines of a text beneath the first one, which has something before it.
func indent(text string, columns int) string {
	return strings.ReplaceAll(text, "\n", "\n"+strings.Repeat(" ", columns))
}
