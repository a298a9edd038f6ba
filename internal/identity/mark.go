package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/silo-nbd/silo-nbd/internal/durable"
)

// attribute is the extended attribute that holds a file's mark.
const attribute = "user.silo-nbd"

// markVersion is the version of what it holds.
const markVersion = 1

// maxMarkPath is the longest path of a state file that a mark holds, in bytes:
// some file systems have little space for attributes.
const maxMarkPath = 1024

// mark is a note that the disk itself bears, whatever name leads to it. It says
// less than the state file, and the state file ends it.
type mark struct {
	Version  int    `json:"version"`
	ID       string `json:"id"` // of the handoff
	Owner    string `json:"owner"`
	Epoch    number `json:"epoch"`
	Disks    int    `json:"disks"`        // of the handoff
	At       string `json:"at,omitempty"` // the destination's address
	State    string `json:"state_path,omitempty"`
	Frozen   bool   `json:"frozen,omitempty"`
	Taken    bool   `json:"taken,omitempty"`
	Complete bool   `json:"complete,omitempty"`
	// Staged: the handoff had begun; only the state file knows whether it was
	// published.
	Staged bool `json:"staged,omitempty"`
	// Alone: no state file could be kept, and this is all that there is. ModTime is
	// then the file's modification time.
	Alone   bool  `json:"alone,omitempty"`
	ModTime int64 `json:"modtime,omitempty"`

	where string // what holds it, in words
}

// markOf returns the mark of a handoff.
func markOf(h *handoff, state string, staged bool) mark {
	m := mark{
		Version: markVersion, ID: h.ID, Owner: h.Owner, Epoch: h.Epoch, Disks: len(h.Disks), State: state, At: h.At,
		Frozen: h.Frozen, Taken: h.Taken, Complete: h.Complete, Staged: staged,
	}
	if len(m.State) > maxMarkPath {
		m.State = ""
	}
	return m
}

// handoff is what is known of a handoff from a mark alone.
func (m *mark) handoff() *handoff {
	return &handoff{ID: m.ID, Owner: m.Owner, Epoch: m.Epoch, At: m.At, Frozen: m.Frozen, Taken: m.Taken, Complete: m.Complete, Marked: m.Alone}
}

func decodeMark(where string, b []byte) (*mark, error) {
	m := &mark{where: where}
	err := json.Unmarshal(b, m)
	if err == nil && m.Version != markVersion {
		err = fmt.Errorf("it has version %d, this program knows %d", m.Version, markVersion)
	}
	if err == nil && m.ID == "" {
		err = errors.New("it names no handoff")
	}
	if err == nil {
		_, err = uuid("owner", m.Owner)
	}
	if err != nil {
		return nil, fmt.Errorf("%s, which says to which destination the disk was handed off, cannot be understood: %w; "+
			"if the disk is this host's, take it back with source --force-reclaim", where, err)
	}
	return m, nil
}

// readMarks returns the marks of a disk.
func readMarks(files durable.FS, d Disk, notes ...string) ([]*mark, error) {
	var marks []*mark
	add := func(where string, b []byte) error {
		m, err := decodeMark(where, b)
		if err == nil {
			marks = append(marks, m)
		}
		return err
	}
	b, err := d.Xattr(attribute)
	switch {
	case err != nil && !noPlace(err):
		return nil, err
	case err == nil && b != nil:
		if err := add(d.Path()+" (attribute "+attribute+")", b); err != nil {
			return nil, err
		}
	}
	for _, note := range notes {
		if note == "" {
			continue
		}
		b, err = files.Read(note)
		if err == nil {
			err = add(note, b)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return marks, nil
}

// noPlace reports whether err says that a mark cannot be kept in a place at all.
func noPlace(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || durable.ReadOnly(err)
}

// writeMark makes the disk bear a mark, durably, in each place that there is.
// attributed reports whether one of them is the file's attribute.
func writeMark(files durable.FS, d Disk, note string, m mark) (attributed bool, err error) {
	b, err := json.Marshal(m)
	if err != nil {
		return false, err
	}
	err = d.SetXattr(attribute, b)
	if err == nil {
		err = d.SyncXattr()
	}
	if err != nil && !noPlace(err) {
		return false, err
	}
	attributed = err == nil
	if note == "" {
		return attributed, nil
	}
	if err := writeNote(files, note, append(b, '\n')); err != nil {
		// A device bears no other mark: with another --state it would be served again.
		return attributed, fmt.Errorf("%s cannot bear a note of its own, and none can be kept for it: %w: name a directory for it with %s", d.Path(), err, stateDirVariable)
	}
	return attributed, nil
}

func writeNote(files durable.FS, note string, b []byte) error {
	if files == durable.OS {
		if err := os.MkdirAll(filepath.Dir(note), 0o755); err != nil {
			return err
		}
	}
	file, err := durable.Replace(files, note, b, false)
	if file != nil {
		err = errors.Join(err, file.Close())
	}
	return err
}

// removeMarks removes the marks of a disk. They must count no more by then.
func removeMarks(files durable.FS, d Disk, notes ...string) error {
	b, err := d.Xattr(attribute)
	if err == nil && b != nil {
		if err = d.RemoveXattr(attribute); err == nil {
			err = d.SyncXattr()
		}
	}
	if noPlace(err) {
		err = nil
	}
	for _, note := range notes {
		if note == "" {
			continue
		}
		if _, missing := files.Read(note); errors.Is(missing, fs.ErrNotExist) {
			continue
		}
		gone := files.Remove(note)
		if gone == nil {
			gone = files.SyncDir(filepath.Dir(note))
		}
		if !noPlace(gone) {
			err = errors.Join(err, gone)
		}
	}
	return err
}
