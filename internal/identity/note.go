package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// ErrHandedOff reports that a disk belongs to a destination.
var ErrHandedOff = errors.New("was handed off to a destination, which has what was written since")

// Note is what is noted at a disk about the destination that owns it.
type Note struct {
	Disk     string   // its path
	ID       string   // of the handoff
	Disks    []string // names of all disks of the handoff, as far as they are known
	Owner    migrate.Device
	Epoch    uint64 // of the owner, as last confirmed; 0: none was
	At       string // the destination's address; empty: it had connected to the source
	Frozen   bool   // it was not in use at its source
	Taken    bool   // the owner has said that it is live
	Complete bool   // the owner has everything
	// Undecided: a handoff had begun, and the state file that knows whether it
	// took place is not there.
	Undecided bool
	Where     string // what says so
	State     string // the path of the state file; empty if it is not known

	silent bool // the state file is there and does not know of the handoff
}

// plainOwner is the device of an owner that has no name for it (migrate.Ledger).
var plainOwner = migrate.Device(bytes.Repeat([]byte{0xff}, 16))

// NoteAt returns what is noted at a disk about who owns it: in its state file,
// which is at state or where that is empty at the default place, and at the
// disk itself. It returns nil if the disk is this host's. It changes nothing.
func NoteAt(f Disk, state string) (*Note, error) {
	at, err := look(durable.OS, f, state)
	if err != nil {
		return nil, err
	}
	return at.note(), nil
}

// NoteOf is NoteAt for a disk that others may have open: it opens and locks nothing.
func NoteOf(path, state string) (*Note, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().IsRegular() {
		return NoteAt(seen{path, info}, state)
	}
	f, err := sources.OpenFile(path, sources.FileOptions{ReadOnly: true, Shared: true})
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read
	return NoteAt(f, state)
}

// seen is a file that is only looked at, by its path.
type seen struct {
	path string
	info fs.FileInfo
}

func (s seen) Path() string        { return s.path }
func (s seen) Size() uint64        { return uint64(s.info.Size()) }
func (s seen) IsBlockDevice() bool { return false }

func (s seen) Stamp() (sources.Stamp, error) { return sources.StampOf(s.path) }

func (s seen) Xattr(name string) ([]byte, error) {
	b := make([]byte, 4096)
	n, err := unix.Getxattr(s.path, name, b)
	switch {
	case errors.Is(err, unix.ENODATA):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%s: read %s: %w", s.path, name, err)
	}
	return b[:n], nil
}

func (s seen) SetXattr(string, []byte) error { return errors.ErrUnsupported }
func (s seen) RemoveXattr(string) error      { return errors.ErrUnsupported }
func (s seen) SyncXattr() error              { return errors.ErrUnsupported }

// EndNote ends what NoteAt returns: another disk's contents have taken the place
// of those that were handed off. The caller must have made durable before that the
// disk is not whole, or is.
func EndNote(f Disk, state string) error { return endNote(durable.OS, f, state) }

func endNote(files durable.FS, f Disk, state string) error {
	at, err := look(files, f, state)
	if err != nil || at.state == nil && len(at.marks) == 0 {
		return err
	}
	if at.state != nil {
		err = at.endState(files)
	}
	if err == nil && len(at.marks) > 0 {
		err = removeMarks(files, f, at.device, at.loop)
	}
	if err != nil {
		return fmt.Errorf("note that %s has come back: %w", f.Path(), err)
	}
	return nil
}

// found is what is kept about a disk.
type found struct {
	disk   Disk
	path   string // of the disk, without links
	where  string // of the state file; empty: a device for which the caller did not say where
	spare  string // where it lies if it cannot lie there; empty: nowhere
	fs     string // names the file system; empty: it is not known
	device string // of the note of a device; empty: none
	loop   string // of the note of a loop device over the file; empty: it is not a file
	behind string // of the file behind a loop device; empty: none
	now    sources.Stamp
	state  *state // nil: there is none
	kin    kinship
	marks  []*mark
}

// look reads what is kept about a disk.
func look(files durable.FS, f Disk, state string) (*found, error) {
	at, err := locate(f, state)
	if err != nil {
		return nil, err
	}
	if state == "" {
		old, err := at.legacy(files.Read)
		if err != nil {
			return nil, err
		}
		if old != "" {
			at.where = old
		}
		if err := at.choose(files); err != nil {
			return nil, err
		}
	}
	if at.where != "" {
		b, err := files.Read(at.where)
		if err := at.read(b, err); err != nil {
			return nil, err
		}
	}
	return at, at.readMarks(files)
}

// legacy is where the state file of an earlier version lies that has put it beside
// a link to the disk; empty if there is none.
func (at *found) legacy(read func(path string) ([]byte, error)) (string, error) {
	old := beside(at.disk.Path())
	if at.where == "" || at.disk.IsBlockDevice() || resolve(old) == at.where {
		return "", nil
	}
	b, err := read(old)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	s, err := decode(old, b)
	if err != nil || s.Version == version || s.Disk.Inode != 0 && s.Disk.Inode != at.now.Inode {
		return "", err // of what the link led to then
	}
	if _, err := read(at.where); !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s has two state files, %s and %s: move the wrong one away", at.path, at.where, old)
	}
	return old, nil
}

// locate says where what is kept about a disk lies.
func locate(f Disk, state string) (at *found, err error) {
	at = &found{disk: f, path: resolve(f.Path())}
	if at.now, err = f.Stamp(); err != nil {
		return nil, err
	}
	if f.IsBlockDevice() {
		at.device, at.behind = deviceNote(at.now), backingFile(at.now)
	} else {
		at.loop = loopNote(at.now)
	}
	switch {
	case state != "":
		at.where = resolve(state)
	default:
		// A device whose state file was not named has none beside it.
		at.where, _ = Default(f.Path(), f.IsBlockDevice())
		at.fs = fileSystem(at.path, at.now)
		at.spare = spareState(at.path, at.fs, at.now)
	}
	return at, nil
}

// read takes what the state file holds.
func (at *found) read(b []byte, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the state file of %s cannot be read, so it is not known whether the disk was handed off: %w", at.disk.Path(), err)
	}
	if at.state, err = decode(at.where, b); err != nil {
		return err
	}
	at.kin = at.state.kin(at.path, at.where, at.now)
	return nil
}

func (at *found) readMarks(files durable.FS) (err error) {
	at.marks, err = readMarks(files, at.disk, at.device, at.loop)
	if err != nil || at.behind == "" {
		return err
	}
	b, err := seen{path: at.behind}.Xattr(attribute)
	if err != nil || b == nil {
		return nil // it has no path here, or bears none
	}
	m, err := decodeMark(at.behind+" (attribute "+attribute+")", b)
	at.marks = append(at.marks, m)
	return err
}

// standing returns the handoff that counts for this disk alone, and what says
// so; nil if there is none. undecided: it is not known whether it was published.
func (at *found) standing() (h *handoff, where string, undecided bool) {
	if at.state != nil && at.state.Handoff != nil {
		return at.state.Handoff, at.where, false
	}
	for _, m := range at.marks {
		if at.state != nil && at.state.knows(m.ID) != "" {
			continue // it has ended, or was never published
		}
		if h == nil || undecided {
			h, where, undecided = m.handoff(), m.where, m.Staged
		}
	}
	return h, where, undecided
}

// note returns what stands about the disk, nil if nothing does.
func (at *found) note() *Note {
	h, where, undecided := at.standing()
	if h == nil {
		return nil
	}
	n := &Note{
		Disk: at.disk.Path(), ID: h.ID, Owner: h.owner(), Epoch: uint64(h.Epoch), At: h.At,
		Frozen: h.Frozen, Taken: h.Taken, Complete: h.Complete, Undecided: undecided, Where: where,
	}
	for _, d := range h.Disks {
		n.Disks = append(n.Disks, d.label())
	}
	if at.state != nil {
		n.State, n.silent = at.where, at.state.Handoff == nil
	} else {
		for _, m := range at.marks {
			if m.ID == h.ID {
				n.State = m.State
			}
		}
	}
	return n
}

// endState ends the handoff in the state file.
func (at *found) endState(files durable.FS) error {
	file, err := files.Open(at.where)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close() // the lock only
	s, err := decode(at.where, file.Content())
	if err != nil {
		return err
	}
	if s.Handoff != nil {
		s.end(s.Handoff.ID, endReturned)
	}
	for _, m := range at.marks {
		s.end(m.ID, endReturned)
	}
	s.Live, s.Open = false, false
	s.Path, s.State, s.FS = at.path, at.where, at.fs
	s.change(unproved(at.now))
	b, err := s.encode()
	if err != nil {
		return err
	}
	kept, err := durable.Replace(files, at.where, b, false)
	if kept != nil {
		err = errors.Join(err, kept.Close())
	}
	return err
}

// unproved names the disk and proves nothing of its contents.
func unproved(s sources.Stamp) sources.Stamp {
	s.ModTime, s.ChangeTime, s.Written, s.BootID = 0, 0, 0, ""
	return s
}

// label names a disk in a message.
func (m member) label() string {
	switch {
	case m.Path != "":
		return m.Path
	case m.Name != "":
		return m.Name
	}
	return "disk " + m.UUID
}

// Err returns why the disk may not be served or sent here, as an ErrHandedOff.
func (n *Note) Err() error { return fmt.Errorf("%s %w: %s", n.Disk, ErrHandedOff, n.Text()) }

// Text says in words to which destination the disk belongs.
func (n *Note) Text() string {
	var b strings.Builder
	owner := fmt.Sprintf("device %x", n.Owner)
	if n.Owner == plainOwner {
		owner = "a plain Silo destination"
	}
	fmt.Fprintf(&b, "%s says that it belongs to %s", n.Where, owner)
	if n.At != "" {
		fmt.Fprintf(&b, " at %s", n.At)
	}
	switch {
	case n.Undecided && n.silent:
		fmt.Fprintf(&b, ", or was about to: its state file (%s) does not know of it", n.State)
	case n.Undecided:
		fmt.Fprintf(&b, ", or was about to: its state file")
		if n.State != "" {
			fmt.Fprintf(&b, " (%s)", n.State)
		}
		b.WriteString(" knows, and is not there: bring it back or name it with --state")
	case n.Complete:
		b.WriteString(", which has all of it")
	case n.Taken:
		b.WriteString(", which is live")
	}
	if len(n.Disks) > 1 {
		names := make([]string, len(n.Disks))
		for i, d := range n.Disks {
			names[i] = filepath.Base(d)
		}
		fmt.Fprintf(&b, "; it was handed off together: %s", strings.Join(names, ", "))
	}
	return b.String()
}
