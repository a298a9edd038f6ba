package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/silo-nbd/silo-nbd/internal/durable"
)

// keeper reads and writes what is kept about disks: their state files, and the marks
// that they bear themselves.
type keeper struct {
	files durable.FS
}

// open reads what is kept about a disk and locks its state file.
func (k keeper) open(d Spec) (*entry, error) {
	at, err := locate(d.Disk, d.State)
	if err != nil {
		return &entry{name: d.Name}, err
	}
	e := &entry{found: *at, name: d.Name, given: d.State != ""}
	if e.where == "" {
		_, err := Default(d.Disk.Path(), d.Disk.IsBlockDevice())
		return e, err
	}
	if d.State == "" {
		if err := errors.Join(k.adopt(e), e.choose(k.files)); err != nil {
			return e, err
		}
	}
	file, err := k.files.Open(e.where)
	var content []byte
	switch {
	case err == nil:
		e.lock, content = file, file.Content()
		_ = durable.Clean(k.files, e.where) // best effort: what is left takes space only
	case errors.Is(err, durable.ErrInUse):
		return e, fmt.Errorf("the state file of %s is in use: a source has this disk already, or another disk with the same --state: %w", d.Disk.Path(), err)
	}
	if err := e.read(content, err); err != nil {
		return e, err
	}
	return e, e.readMarks(k.files)
}

// adopt takes the state file that an earlier version has put beside a link to
// where it belongs.
func (k keeper) adopt(e *entry) error {
	old, err := e.legacy(k.files.Read)
	if err != nil || old == "" {
		return err
	}
	if err = k.files.Claim(old, e.where); err == nil {
		err = k.files.SyncDir(dirOf(e.where))
	}
	if err != nil {
		return fmt.Errorf("the state file of %s belongs beside the disk that the link leads to: %w", e.path, err)
	}
	return nil
}

// published reports whether the state file says that the disk was handed off.
func (e *entry) published() bool {
	if e.lock == nil {
		return false
	}
	s, err := decode(e.where, e.lock.Content())
	return err == nil && s.Handoff != nil
}

// save makes the state of a disk durable.
func (k keeper) save(e *entry) error {
	if e.lacks != nil {
		return nil
	}
	e.state.Path, e.state.State, e.state.FS = e.path, e.where, e.fs
	b, err := e.state.encode()
	if err != nil || e.lock != nil && string(e.lock.Content()) == string(b) {
		return err
	}
	file, err := durable.Replace(k.files, e.where, b, e.lock == nil)
	if file != nil {
		err = errors.Join(err, e.swap(file))
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: a source has made the state file of this disk just now", durable.ErrInUse)
	}
	return err
}

// swap holds another file's lock in place of the present one.
func (e *entry) swap(file durable.File) (err error) {
	if e.lock != nil {
		err = e.lock.Close()
	}
	e.lock = file
	return err
}

// saveSpare puts the state file into the state directory.
func (k keeper) saveSpare(e *entry) error {
	if err := k.makeDir(dirOf(e.spare)); err != nil {
		return err
	}
	where, lock := e.where, e.lock
	e.where, e.lock = e.spare, nil
	err := k.save(e)
	if err != nil && e.lock == nil {
		e.where, e.lock = where, lock
		return err
	}
	if lock != nil {
		err = errors.Join(err, lock.Close())
	}
	return err
}

// makeDir makes the state directory.
func (k keeper) makeDir(dir string) error {
	if k.files != durable.OS {
		return nil
	}
	return os.MkdirAll(dir, 0o755)
}

// first writes the state file of a disk for the first time. A frozen disk can be
// sent without one: then no other process has its identity.
func (k keeper) first(e *entry, o Options) error {
	err := k.save(e)
	if err != nil && e.spare != "" && e.where != e.spare && (durable.ReadOnly(err) || durable.NoSpace(err)) {
		if k.saveSpare(e) == nil {
			return nil
		}
	}
	switch {
	case err == nil:
		return nil
	case o.Live:
		return fmt.Errorf("keep that %s is in use here: %w: say with --state where its state file is to lie", e.disk.Path(), err)
	case e.given:
		return fmt.Errorf("--state: keep the disk's identity: %w", err)
	case o.Reclaim, len(e.marks) > 0, e.published(), errors.Is(err, durable.ErrInUse):
		return fmt.Errorf("keep the identity of %s: %w: say with --state where its state file is to lie", e.disk.Path(), err)
	}
	e.lacks = err
	return nil
}

// mark makes the disk itself say what the handoff is.
func (k keeper) mark(e *entry, h *handoff, staged bool) error {
	m := markOf(h, e.where, staged)
	if e.lacks != nil {
		m.State, m.Alone, m.ModTime = "", true, e.watch.ModTime
	}
	return e.touch(func() (err error) {
		h.Marked, err = writeMark(k.files, e.disk, e.device, m)
		return err
	})
}

// unmark removes what mark has made.
func (k keeper) unmark(e *entry) error {
	err := e.touch(func() error { return removeMarks(k.files, e.disk, e.device, e.loop) })
	if err == nil {
		e.marks = nil
	}
	return err
}

// touch does what changes the disk's change time and not its contents, and
// watches it from then on as it is afterwards.
func (e *entry) touch(do func() error) error {
	before, err := e.disk.Stamp()
	if err != nil {
		return err
	}
	intact := e.watch == before
	if err := do(); err != nil {
		return err
	}
	after, err := e.disk.Stamp()
	if err != nil || !intact {
		return err
	}
	before.ChangeTime = after.ChangeTime
	if before == after {
		e.watch = after
	}
	return nil
}
