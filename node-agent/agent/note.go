package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/vmckpt/vmckpt/node-agent/durable"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/restore"
)

// note is that a restore is complete, kept until the API server knows: done twice it would take from the guest what it has done since.
type note struct {
	Result *restore.Result   `json:"result"`
	Found  *jobs.ImageResult `json:"found"`
}

func noteName(uid types.UID) string { return "restored-" + string(uid) + ".json" }

// readNote returns the note of a restore, or nil.
func (a *Agent) readNote(uid types.UID) (*note, error) {
	dir, err := os.OpenRoot(a.o.NotesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look whether the restore is done: %w", err)
	}
	defer dir.Close()
	text, err := dir.ReadFile(noteName(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	n := &note{}
	if err == nil {
		err = json.Unmarshal(text, n)
	}
	if err == nil && (n.Result == nil || n.Found == nil) {
		err = errors.New("it says nothing")
	}
	if err != nil {
		return nil, fmt.Errorf("look whether the restore is done: %s: %w", noteName(uid), err)
	}
	return n, nil
}

// writeNote writes it. Where that fails the restore is done all the same.
func (a *Agent) writeNote(ctx context.Context, uid types.UID, n *note) {
	err := os.MkdirAll(a.o.NotesDir, 0o700)
	if err == nil {
		var dir *os.Root
		if dir, err = os.OpenRoot(a.o.NotesDir); err == nil {
			defer dir.Close()
			err = durable.WriteJSON(dir, noteName(uid), n)
		}
	}
	if err != nil {
		log.FromContext(ctx).Error(err, "the end of a restore could not be noted on the node")
	}
}

// forgetNote removes it, if it is there.
func (a *Agent) forgetNote(uid types.UID) {
	if dir, err := os.OpenRoot(a.o.NotesDir); err == nil {
		defer dir.Close()
		durable.Remove(dir, noteName(uid)) //nolint:errcheck // harmless: the uid never comes again
	}
}
