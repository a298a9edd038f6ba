package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Whether a disk that must not be written was written can be proved, refuted, or
// neither. Another modification time, another size, or another count of written sectors
// within a boot prove it: that is noted, and the destination gets nothing more, since
// what it has not fetched yet cannot be compared. The times as they were refute it. What
// is left, such as a change time that moved alone or a device after a restart of the host,
// is not proved: then samples of the contents are compared here, and the ends compare what
// the destination has.

const (
	// samples is how many places of a disk are remembered, and sampleSize how much is
	// read there.
	samples    = 64
	sampleSize = 4096
	// sumSize is how much of a sample's hash is kept.
	sumSize = 8
)

// stay is Open for disks that were handed off.
func (l *Ledger) stay(o Options) error {
	for _, e := range l.disks {
		e.watch = e.now
	}
	if l.finished {
		return nil
	}
	for _, e := range l.disks {
		if err := l.mayBeSent(e, o); err != nil {
			return err
		}
	}
	for _, e := range l.disks {
		if e.lacks == errAlone {
			e.lacks = nil
			e.lacks = l.place(e)
		}
		if e.state == nil || e.state.Written == "" && (e.unchanged() || e.unchangedSinceHandOff()) {
			continue
		}
		if h := e.state.Handoff; h != nil && len(e.marks) == 0 {
			_ = l.mark(e, h, false) // an earlier version made none; the state file says it anyway
		}
		e.state.Generation, e.state.Disk, e.state.Met, e.state.Written = draw(), e.watch, "", ""
		if err := l.save(e); err != nil {
			return fmt.Errorf("note that %s may have changed: %w", e.disk.Path(), err)
		}
	}
	return nil
}

// mayBeSent returns why what is here now is not the rest of a disk that was handed off.
func (l *Ledger) mayBeSent(e *entry, o Options) error {
	switch {
	case e.state == nil || e.state.Handoff == nil:
		return nil
	case e.kin != kinSame && !o.Moved && e.lacksMark():
		return fmt.Errorf("%w; but what is at %s now is another file (inode %d, and it was %d), and does not bear the mark of that disk: nothing was sent: "+
			"bring the right one back, or, if this is a copy of it as it was, add --disk-moved",
			e.note().Err(), e.disk.Path(), e.now.Inode, e.state.Disk.Inode)
	case e.state.Written == "" && (e.unchanged() || e.unchangedSinceHandOff()):
		return nil
	}
	if why := e.state.Written; why != "" && !o.Moved {
		return e.wasWritten(why)
	}
	why := ""
	if !o.Moved {
		why = e.writtenSince()
	}
	if why == "" {
		why = e.differs()
	}
	if why == "" {
		return nil
	}
	return errors.Join(e.wasWritten(why), l.noteWritten(e, why))
}

// wasWritten says that a disk that was handed off was written here.
func (e *entry) wasWritten(why string) error {
	return fmt.Errorf("%s was written here after it was handed off to device %s: %s: nothing was sent, since the destination would have a mixture: "+
		"see what has written it, then begin anew: the source with --force-reclaim, and after that the destination with --overwrite; "+
		"if it was surely not written, only touched: --disk-moved, and the destination compares what it has", e.disk.Path(), e.state.Handoff.Owner, why)
}

// noteWritten makes it durable that a disk that was handed off was written. Another file
// in its place says nothing of the disk.
func (l *Ledger) noteWritten(e *entry, why string) error {
	if e.kin != kinSame || e.state.Handoff == nil || !l.handedOff || e.state.Written != "" {
		return nil
	}
	e.state.Written = why
	if err := l.save(e); err != nil {
		return fmt.Errorf("note that %s was written: %w", e.disk.Path(), err)
	}
	return nil
}

// unchanged reports whether it is proved that the disk has the contents of its
// generation.
func (e *entry) unchanged() bool {
	return e.kin == kinSame && e.state.Generation != 0 && e.state.Disk.Unchanged(e.now)
}

// unstamped reports whether the state file was written for a live disk whose process was
// killed right after the handoff: it has got its name after the last write.
func (e *entry) unstamped() bool {
	return e.kin == kinSame && e.state.Live && !e.now.Block && e.state.Disk.ChangeTime == 0
}

// unchangedSinceHandOff is unchanged for such a disk.
func (e *entry) unchangedSinceHandOff() bool {
	return e.unstamped() && e.now.ChangeTime != 0 && e.now.ChangeTime <= e.lock.Changed()
}

// writtenSince returns what shows that the disk was written since it was handed off; empty
// if nothing does.
func (e *entry) writtenSince() string {
	// Times of two file systems may be those of two clocks.
	if e.unstamped() && filepath.Dir(e.where) == filepath.Dir(e.path) && e.now.ModTime > e.lock.Changed() {
		return "its modification time is later than the handoff"
	}
	return written(e.state.Disk, e.now)
}

// written returns what shows, in the stamps of a disk, that it was written; empty if
// nothing does.
func written(was, now sources.Stamp) string {
	switch {
	case was.Size != now.Size:
		return fmt.Sprintf("it had %d bytes and has %d now", was.Size, now.Size)
	case was.ModTime != 0 && now.ModTime != 0 && was.ModTime != now.ModTime && was.WWID == now.WWID:
		return "its modification time is another"
	case was.Block && was.BootID != "" && was.BootID == now.BootID && was.DiskSeq == now.DiskSeq && was.Dev == now.Dev && was.Written != now.Written:
		return fmt.Sprintf("the kernel had counted %d sectors written and now %d", was.Written, now.Written)
	}
	return ""
}

// lacksMark reports whether a file does not bear the mark that the disk bears.
func (e *entry) lacksMark() bool {
	if !e.state.Handoff.Marked {
		return false
	}
	if _, err := e.disk.Xattr(attribute); err != nil {
		return false // there are no attributes here
	}
	for _, m := range e.marks {
		if m.ID == e.state.Handoff.ID {
			return false
		}
	}
	return true
}

// Changed returns what was done to the i-th disk, which must not be written here,
// since it was opened, apart from what the Ledger has done to it. That it was written is
// noted if it was handed off.
func (l *Ledger) Changed(i int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.disks[i]
	if l.live && !l.handedOff || e.watch == (sources.Stamp{}) {
		return nil
	}
	now, err := e.disk.Stamp()
	if err != nil {
		return err
	}
	if e.watch.Unchanged(now) || sameWithoutCount(e.watch, now) {
		return nil
	}
	why := e.difference(now)
	if why == "" {
		if e.doubt == 0 && l.doubt != nil {
			l.doubt(e.name)
		}
		e.doubt = now.ChangeTime
		return nil
	}
	err = fmt.Errorf("%s was written while it was sent: %s: the copy is of no use: see what has written it, then begin anew: "+
		"the source with --force-reclaim, and after that the destination with --overwrite", e.disk.Path(), why)
	if e.state == nil {
		return err
	}
	return errors.Join(err, l.noteWritten(e, why))
}

// difference says in words how a disk was written or replaced since it is watched. It
// is empty if only its change time moved, and its samples are as they were.
func (e *entry) difference(now sources.Stamp) string {
	if why := written(e.watch, now); why != "" {
		return why
	}
	alone := now
	alone.ChangeTime = e.watch.ChangeTime
	switch {
	case alone != e.watch:
		return "another disk is in its place"
	case e.doubt == now.ChangeTime:
		return ""
	}
	return e.differs()
}

// sameWithoutCount reports whether two stamps of a device of which the kernel does
// not count the writes, or of a file without times, differ in nothing that is known.
func sameWithoutCount(a, b sources.Stamp) bool {
	return a == b && !a.Unchanged(b)
}

// sample remembers samples of the contents, if there are none.
func (e *entry) sample() {
	if e.state.Samples == "" {
		e.state.Samples = hex.EncodeToString(e.sums())
	}
}

// differs returns which sample differs from what is remembered; empty if none does.
func (e *entry) differs() string {
	if e.state == nil {
		return ""
	}
	was, err := hex.DecodeString(e.state.Samples)
	if err != nil || len(was) == 0 {
		return ""
	}
	now, unread := e.sums(), make([]byte, sumSize)
	if len(now) == 0 {
		return ""
	}
	for i := 0; i < min(len(was), len(now)); i += sumSize {
		a, b := was[i:min(i+sumSize, len(was))], now[i:i+sumSize]
		if !bytes.Equal(a, b) && !bytes.Equal(a, unread) && !bytes.Equal(b, unread) {
			return fmt.Sprintf("what is at %d differs from what was there", e.place(i/sumSize))
		}
	}
	return ""
}

// place is where the i-th sample lies: they are spread over the disk, with its first and
// its last bytes.
func (e *entry) place(i int) int64 {
	last := max(0, int64(e.disk.Size())-sampleSize)
	return last * int64(i) / (samples - 1) / sampleSize * sampleSize
}

// sums returns the hashes of the samples, zeroes for those that cannot be read; none if
// the disk cannot be read here.
func (e *entry) sums() []byte {
	r, ok := e.disk.(io.ReaderAt)
	if !ok || e.disk.Size() < sampleSize {
		return nil
	}
	all, b := make([]byte, 0, samples*sumSize), make([]byte, sampleSize)
	for i := range samples {
		sum := [sha256.Size]byte{}
		if _, err := r.ReadAt(b, e.place(i)); err == nil {
			sum = sha256.Sum256(b)
		}
		all = append(all, sum[:sumSize]...)
	}
	return all
}
