package inspect

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/silo-nbd/silo-nbd/internal/identity"
)

// stateHandedOff is the state of a disk that a source here has handed off.
const stateHandedOff = "handed off"

// Owner is the destination's device that a disk was handed off to.
type Owner struct {
	Device   string   `json:"device"`
	At       string   `json:"at,omitempty"`    // the destination's address, if the source connected to it
	Disks    []string `json:"disks,omitempty"` // all that were handed off together, if that is known
	Taken    bool     `json:"taken"`           // the device has said that it is live
	Complete bool     `json:"complete"`        // it has everything
	// Undecided: the handoff had begun; the state file that knows whether it took
	// place is not there.
	Undecided bool   `json:"undecided,omitempty"`
	Note      string `json:"note"` // what says so

	text string
}

// Disk reports what is known of disk: by its map, which is at path, and by what is
// noted at it about who owns it; its state file is at state, or beside it if that
// is empty. It changes nothing.
func Disk(disk, path, state string) (*Report, error) {
	r, err := Of(disk, path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	note, noteErr := identity.NoteOf(disk, state)
	switch {
	case err != nil && (noteErr != nil || note == nil):
		if noteErr != nil && !errors.Is(noteErr, fs.ErrNotExist) {
			return nil, noteErr
		}
		return nil, err
	case err != nil:
		r = &Report{Disk: disk, State: stateHandedOff, Runs: []Run{}}
	case noteErr != nil:
		r.Safe, r.Problem = false, noteErr.Error()
	}
	if note != nil {
		r.Safe = false
		r.HandedOff = &Owner{
			Device: fmt.Sprintf("%x", note.Owner), At: note.At, Disks: note.Disks,
			Taken: note.Taken, Complete: note.Complete, Undecided: note.Undecided, Note: note.Where, text: note.Text(),
		}
	}
	return r, nil
}
