package identity

import (
	"errors"
	"fmt"

	"github.com/silo-nbd/silo-nbd/internal/durable"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// staging is a handoff between Prepare and its end.
type staging struct {
	id    string
	disks []*stagedDisk
}

// stagedDisk is a disk of it.
type stagedDisk struct {
	*entry
	gone, back           *state // after the handoff, and after it was taken back
	goneFile, backFile   durable.File
	goneAt, backAt       string // where these files lie until they are renamed
	renamed, renamedBack bool
}

// Owner implements migrate.Ledger.
func (l *Ledger) Owner(disk string) (o migrate.Owner, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.disks.entry(disk)
	if e == nil {
		return o, false
	}
	h, _, _ := e.standing()
	if h == nil || !l.handedOff {
		return o, false
	}
	return migrate.Owner{Device: h.owner(), Epoch: uint64(h.Epoch), Steps: h.Steps, Taken: h.Taken}, true
}

// Peer implements migrate.Ledger.
func (l *Ledger) Peer(disk string) (o migrate.Owner, ok bool) {
	if o, ok := l.Owner(disk); ok {
		return o, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.disks.entry(disk)
	if e == nil || e.state == nil || e.state.Peer == nil {
		return o, false
	}
	p := e.state.Peer
	device, _ := uuid("device", p.Device) // checked when it was read
	return migrate.Owner{Device: device, Epoch: uint64(p.Epoch), Steps: p.Steps}, true
}

// Confirm implements migrate.Ledger.
func (l *Ledger) Confirm(disk string, o migrate.Owner) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.show()
	e := l.disks.entry(disk)
	if e == nil || e.state == nil {
		return fmt.Errorf("no disk is called %q", disk)
	}
	if h := e.state.Handoff; h != nil && l.handedOff {
		if h.Owner != deviceDigits(o.Device) {
			return fmt.Errorf("%s belongs to device %s, not to %x", e.disk.Path(), h.Owner, o.Device)
		}
		changed := *h
		changed.Epoch, changed.Steps = number(o.Epoch), o.Steps
		e.state.Handoff = &changed
	} else {
		e.state.Peer = &peer{Device: deviceDigits(o.Device), Epoch: number(o.Epoch), Steps: o.Steps}
		if !l.live {
			return nil // the handoff follows at once, and nothing is believed before it
		}
	}
	if err := l.save(e); err != nil {
		return fmt.Errorf("note which destination %s has met: %w", e.disk.Path(), err)
	}
	return nil
}

// Prepare implements migrate.Ledger. A state file that does not say that its disk
// was handed off knows of the handoff from now on: so a handoff that only a part
// of the state files says is told from one that was published.
func (l *Ledger) Prepare(to map[string]migrate.Owner) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.handedOff {
		return errors.New("the disks were handed off before")
	}
	for _, e := range l.disks {
		if _, ok := to[e.name]; !ok {
			return fmt.Errorf("no destination for %s, which belongs to the others", e.disk.Path())
		}
	}
	if err := l.dropStaged(); err != nil {
		return fmt.Errorf("remove what an earlier attempt has left: %w", err)
	}
	st := &staging{id: newUUID()}
	l.staged = st
	defer func() {
		if err != nil {
			_ = l.dropStaged() // best effort: it is tried again
			err = fmt.Errorf("note the handoff beforehand: %w", err)
		}
	}()
	members := l.disks.members()
	err = l.eachInOrder(func(e *entry) error {
		if e.lacks != nil && !durable.ReadOnly(e.lacks) {
			e.lacks = nil // there may be room now
		}
		e.state.end(e.state.Staged, endAborted)
		e.state.Staged = st.id
		return l.save(e)
	})
	if err != nil {
		return err
	}
	st.disks = make([]*stagedDisk, len(l.disks))
	for i, e := range l.disks {
		st.disks[i] = &stagedDisk{entry: e}
	}
	return each(l.workers, st.disks, func(d *stagedDisk) error {
		o := to[d.name]
		h := &handoff{
			ID: st.id, Disks: members, Frozen: !l.live, At: l.at,
			Owner: deviceDigits(o.Device), Epoch: number(o.Epoch), Steps: o.Steps,
		}
		if err := l.mark(d.entry, h, true); err != nil {
			return err
		}
		d.gone, d.back = d.stage(h, l.live)
		return d.create(l.files, l.live)
	})
}

// stage makes the two states of a disk, one of which will count.
func (e *entry) stage(h *handoff, live bool) (gone, back *state) {
	gone, back = new(state), new(state)
	*gone, *back = *e.state, *e.state
	gone.Handoff, gone.Staged, gone.Open = h, "", false
	if live {
		gone.Disk = unproved(e.now) // it is still being written
	} else {
		gone.Disk, back.Disk = e.watch, e.watch // the mark has changed it
	}
	return gone, back
}

// create writes the state file that counts after the handoff, under a temporary
// name, and if writes will be held then also the one to take it back.
func (d *stagedDisk) create(files durable.FS, live bool) (err error) {
	if d.lacks != nil {
		return nil
	}
	if d.goneAt, d.goneFile, err = d.temporary(files, d.gone); err != nil || !live {
		return err
	}
	d.backAt, d.backFile, err = d.temporary(files, d.back)
	return err
}

func (d *stagedDisk) temporary(files durable.FS, s *state) (at string, file durable.File, err error) {
	s.Path, s.State, s.FS = d.path, d.where, d.fs
	b, err := s.encode()
	if err != nil {
		return "", nil, err
	}
	at = durable.NewTemp(d.where)
	file, err = files.Create(at, b)
	return at, file, err
}

// HandOff implements migrate.Ledger. It renames what Prepare has written, and
// makes the names durable.
func (l *Ledger) HandOff() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.show()
	if l.staged == nil {
		return errors.New("no handoff was prepared")
	}
	for _, d := range l.staged.disks {
		if d.lacks == nil {
			if err := l.files.Rename(d.goneAt, d.where); err != nil {
				return err
			}
			d.renamed = true
			_ = d.swap(d.goneFile) // of a file that was only read
			d.goneFile = nil
		}
	}
	for dir := range l.staged.dirs() {
		if err := l.files.SyncDir(dir); err != nil {
			return err
		}
	}
	for _, d := range l.staged.disks {
		if d.lacks != nil { // then its mark says so alone
			if err := l.mark(d.entry, d.gone.Handoff, false); err != nil {
				return err
			}
		}
	}
	l.handedOff = true
	for _, d := range l.staged.disks {
		d.entry.state = d.gone
		d.entry.watch = sources.Stamp{}
		if now, err := d.disk.Stamp(); err == nil { // else it is not watched before Taken
			d.entry.watch = now
		}
	}
	return nil
}

// dirs are the directories of the state files.
func (s *staging) dirs() map[string]bool {
	dirs := make(map[string]bool)
	for _, d := range s.disks {
		if d.lacks == nil {
			dirs[dirOf(d.where)] = true
		}
	}
	return dirs
}

// TakeBack implements migrate.Ledger. A handoff counts only if all state files
// say so: one that durably does not is enough.
func (l *Ledger) TakeBack() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.show()
	st := l.staged
	if st == nil {
		return nil
	}
	var errs []error
	ours, kept := false, 0
	for _, d := range st.disks {
		if d.lacks == nil {
			kept++
			errs = append(errs, d.takeBack(l.files, st.id))
		}
	}
	for _, d := range st.disks {
		if d.lacks == nil {
			err := d.settled(l.files, st.id)
			errs = append(errs, err)
			ours = ours || err == nil
		}
	}
	if !ours && kept > 0 {
		return errors.Join(errs...)
	}
	l.handedOff = false
	for _, d := range st.disks {
		d.entry.state = d.back
	}
	_ = l.dropStaged() // best effort: the next Prepare does it again
	return nil
}

// takeBack makes the state file say again that the disk is ours, if it does not.
func (d *stagedDisk) takeBack(files durable.FS, id string) error {
	says, err := d.says(files, id)
	if err != nil || !says {
		return err
	}
	if d.backFile == nil {
		if d.backAt, d.backFile, err = d.temporary(files, d.back); err != nil {
			return err
		}
	}
	if err := files.Rename(d.backAt, d.where); err != nil {
		return err
	}
	d.renamed, d.renamedBack = true, true
	_ = d.swap(d.backFile) // of a file that was only read
	d.backFile = nil
	return nil
}

// says reports whether the state file says now that the disk was handed off.
func (d *stagedDisk) says(files durable.FS, id string) (bool, error) {
	b, err := files.Read(d.where)
	if err != nil {
		return true, err
	}
	s, err := decode(d.where, b)
	if err != nil {
		return true, err
	}
	return s.Handoff != nil && s.Handoff.ID == id, nil
}

// settled returns nil if the state file durably says that the disk is ours.
func (d *stagedDisk) settled(files durable.FS, id string) error {
	says, err := d.says(files, id)
	switch {
	case err != nil:
		return err
	case says:
		return errors.New("it says that it was handed off")
	case !d.renamed:
		return nil // what is there was made durable by Prepare
	}
	return files.SyncDir(dirOf(d.where))
}

// dropStaged removes what Prepare has made and no handoff needs.
func (l *Ledger) dropStaged() error {
	st := l.staged
	if st == nil {
		return nil
	}
	l.staged = nil
	var errs []error
	for _, d := range st.disks {
		for _, f := range []struct {
			file durable.File
			at   string
		}{{d.goneFile, d.goneAt}, {d.backFile, d.backAt}} {
			if f.file != nil {
				errs = append(errs, f.file.Close(), l.files.Remove(f.at))
			}
		}
	}
	if !l.handedOff {
		for _, e := range l.disks {
			errs = append(errs, l.unmark(e))
		}
	}
	return errors.Join(errs...)
}

// Taken implements migrate.Ledger. The mark at the disk stays as it is: it would change
// the disk's change time, and a kill before that is in the state file would make
// another generation of contents that the destination has begun to take.
func (l *Ledger) Taken() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.show()
	if !l.handedOff {
		return errors.New("the disks were not handed off")
	}
	err := l.dropStaged()
	return noted(errors.Join(err, each(l.workers, l.disks, func(e *entry) error {
		if e.state == nil || e.state.Handoff == nil || e.state.Handoff.Taken && (e.doubt != 0 || e.state.Disk.Unchanged(e.watch)) {
			return nil
		}
		e.sample()
		e.answered(false)
		return l.save(e)
	})))
}

// answered notes what the destination has said of a disk that was handed off.
func (e *entry) answered(complete bool) *handoff {
	h := *e.state.Handoff
	h.Taken, h.Complete = true, h.Complete || complete
	e.state.Handoff = &h
	if e.doubt == 0 && e.watch.Unchanged(e.watch) {
		e.state.Disk = e.watch
	}
	return &h
}

// Complete implements migrate.Ledger.
func (l *Ledger) Complete() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.show()
	if !l.handedOff {
		return errors.New("the disks were not handed off")
	}
	err := each(l.workers, l.disks, func(e *entry) error {
		if e.state == nil || e.state.Handoff == nil {
			return nil
		}
		h := e.answered(true)
		return errors.Join(l.save(e), l.mark(e, h, false))
	})
	l.finished = true
	return noted(err)
}

func noted(err error) error {
	if err != nil {
		return fmt.Errorf("note what the destination has: %w", err)
	}
	return nil
}
