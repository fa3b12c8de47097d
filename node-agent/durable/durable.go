package durable

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// WriteJSON puts a value in place of whatever the file held, readable by its owner alone.
func WriteJSON(dir *os.Root, name string, value any) error {
	text, err := json.MarshalIndent(value, "", "\t")
	if err != nil {
		return err
	}
	return WriteFile(dir, name, append(text, '\n'))
}

// WriteFile puts text in place of whatever the file held, readable by its owner alone.
func WriteFile(dir *os.Root, name string, text []byte) error {
	// A fixed name: nobody else writes it, and after a crash nothing is left behind but this one.
	temporary := name + ".new"
	f, err := dir.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(temporary, name); err != nil {
		return err
	}
	return sync(dir)
}

// Remove takes the file away, if it is there.
func Remove(dir *os.Root, name string) error {
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return sync(dir)
}

func sync(dir *os.Root) error {
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
