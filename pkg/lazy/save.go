package lazy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

const (
	// saveLatest is how long what has changed may be in memory only, when no client
	// flushes. A save syncs all that clients have written, too, which costs them
	// more than it spares them: of a program that is killed only the bits are gone.
	saveLatest = 3 * saveEvery // it is looked at so often
	// saveWorth is how much has to have arrived, in bytes, for a save to come
	// earlier, saveEvery after the one before: so much is not moved again, and not
	// left to the first flush of a client.
	saveWorth = 64 << 20
	saveEvery = 3 * time.Second
)

// maxKept is how large a snapshot may be for its memory to be used again.
const maxKept = 256 << 10 // bytes

// saver keeps the map of a device. m is changed by who holds both turns of the
// flusher, so who holds one may read it; the map is written by the holder of its
// turn.
type saver struct {
	m     *Map // nil: none, or not needed any more
	state *state
	spoil func()    // has the next flush be an ordinary one
	snaps sync.Pool // of *snapshot
}

// flushDisk takes the bits that have changed as they stand, and makes durable what
// was written before it. When it has, and not before, save may write these bits.
func (d *Device) flushDisk() (*snapshot, error) {
	s := &d.saver
	d.capture.drop() // first: what it held is on the disk, and its bits are set
	var snap *snapshot
	if s.m != nil {
		snap, _ = s.snaps.Get().(*snapshot)
		if snap == nil {
			snap = new(snapshot)
		}
		snap.fill(s.state, s.m.layout.maskWords())
	}
	if err := d.disk.Flush(); err != nil {
		return nil, fmt.Errorf("lazy: flush the disk: %w", err)
	}
	return snap, nil
}

// save writes the bits of a snapshot, if there is one, to the map, and makes them
// durable. If there is no room for them, nothing is lost: the map is as it was, or
// has some of the new bits, and all of them will be written again.
func (s *saver) save(snap *snapshot) error {
	if snap == nil {
		return nil
	}
	err := s.m.save(snap)
	if noRoom(err) {
		s.giveUp(snap)
		return &roomError{err}
	}
	s.keep(snap)
	return err
}

// giveUp has all of a snapshot taken again by the next one.
func (s *saver) giveUp(snap *snapshot) {
	if snap == nil {
		return
	}
	s.spoil() // what was collected for the log is neither there nor durable
	snap.putBack(s.state)
	s.keep(snap)
}

// keep keeps the memory of a snapshot for another one.
func (s *saver) keep(snap *snapshot) {
	if cap(snap.bits) <= maxKept && cap(snap.words) <= maxKept/8 {
		s.snaps.Put(snap)
	}
}

// roomError is a commit that failed for lack of space, and may be tried again.
type roomError struct{ error }

func (e *roomError) Unwrap() error { return e.error }

// noRoom says that a write to the disk or the map found the file system full. A
// sync that says so is another matter: what it did not write is gone.
func noRoom(err error) bool {
	var final *finalError
	return (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && !errors.As(err, &final)
}

// adopt makes a device that has just been made what its map says.
func (d *Device) adopt(m *Map, o Options) error {
	h := m.header()
	if h.id.Size != d.size || h.id.BlockSize != d.blockSize {
		return fmt.Errorf("%s: %w: it is for a disk of %d bytes in blocks of %d, and this one has %d in blocks of %d: choose the right one",
			m.path, ErrMapMismatch, h.id.Size, h.id.BlockSize, d.size, d.blockSize)
	}
	if h.state == MapLive && o.Revocable && h.flags&flagRevocable == 0 {
		return fmt.Errorf("%s: %w: its disk was written here while no block could be taken back, so none can be now: use a source that hands over",
			m.path, ErrMapMismatch)
	}
	if !m.used.CompareAndSwap(false, true) {
		return fmt.Errorf("%s: a device has this map already: %w", m.path, syscall.EBUSY)
	}
	if err := m.load(d.state, o.Revocable); err != nil {
		return fmt.Errorf("%s: %w", m.path, err)
	}
	// What a crash has left of blocks that are missing is anything but zeroes.
	d.knownZero.Store(o.KnownZero && m.fresh)
	kept, failed := d.takeMirror(m, o)
	h = m.header() // the mirror may have told it something
	if failed {
		if err := d.distrust(m); err != nil {
			return err
		}
	}
	if h.state == MapComplete {
		if failed {
			if err := m.trusted(); err != nil {
				return err
			}
		}
		if err := m.shrink(); err != nil {
			d.log.Warn("the map could not be shrunk; it is complete all the same", "map", m.path, "error", err)
		}
		forgetMirror(m, o, d.log)
		d.sealed.Store(true)
		d.enterLive()
		d.complete.Store(true)
		d.direct.Store(true)
		return nil
	}
	d.mapped = true
	d.saver.m, d.saver.state, d.saver.spoil = m, d.state, d.capture.spoil
	d.state.changes = newChanges(d.state.blocks)
	d.state.partial.changes = d.state.changes
	if kept {
		d.joinMirror(o.Revocable)
	}
	// A dirty list that ended half-way leaves samples of blocks that will come anew.
	h.bond.drop(func(block int64) bool { return !d.state.isLocal(block) })
	if m.backing != nil {
		d.watchBlocks(&h.bond, newGate())
	}
	h.flags &^= flagRevocable
	if o.Revocable {
		h.flags |= flagRevocable
	}
	if h.epoch == (epochs{}) { // of a map of version 1
		h.epoch = newEpochs()
	}
	var err error
	cache := o.cacheName(m)
	there := kept || !failed && d.cached(m, cache)
	h.boot = cache
	if m.log != nil && h.state == MapLive && !there {
		h.boot = UUID{} // not before the log is laid over the disk
	}
	if !kept && !m.fresh {
		h.save = newEpoch() // a mirror that is there and not used does not belong to it any more
	}
	if h != m.header() {
		err = m.replaceHeader(h)
	}
	if err == nil && m.log != nil {
		err = d.replay(m, kept, there)
	}
	if err == nil {
		err = m.update(func(h *header) {
			h.flags &^= flagFailed // what was read of the device is durable, and so is what replay wrote
			h.boot = cache
		})
	}
	if err != nil {
		return err
	}
	d.state.mirror.validate() // not before: of a mirror that counts no log is laid over the disk
	if h.state == MapLive {
		d.enterLive()
	}
	return nil
}

// finish makes it durable that the device is complete, which its disk has to be,
// and gives up the map.
func (d *Device) finish() error {
	s := &d.saver
	if s.m == nil {
		return nil
	}
	if s.m.log.used() { // by a flush since the one before this: the disk may not have that yet
		snap, err := d.flushDisk()
		if err == nil {
			err = s.save(snap)
		}
		if err != nil {
			return err
		}
	}
	if err := s.m.update(func(h *header) { h.state = MapComplete }); noRoom(err) {
		return &roomError{err}
	} else if err != nil {
		return err
	}
	if s.m.backing != nil {
		err := s.m.mark(func(*header) {})
		if err == nil {
			err = s.m.settleMark()
		}
		if err != nil { // the mark before still counts
			d.log.Warn("the disk could not be marked as complete; it is complete all the same", "map", s.m.path, "error", err)
		}
	}
	if err := s.m.shrink(); err != nil {
		d.log.Warn("the map could not be shrunk; it is complete all the same", "map", s.m.path, "error", err)
	}
	s.m = nil
	if w := d.witness.watch.Swap(nil); w != nil {
		w.writers.shut()
	}
	d.state.mirror.forget()
	d.capture.stop()
	return nil
}

// arrived is how much is here that the source sent, in bytes.
func (d *Device) arrived() int64 {
	return (d.state.local.Load() - d.state.writes.Load()) * d.blockSize
}

// saveLoop saves what has changed, in a while, when nobody flushes.
func (d *Device) saveLoop() {
	timer := time.NewTimer(saveEvery)
	defer timer.Stop()
	var told time.Time // when the log was told that there is no room
	for {
		select {
		case <-d.closing:
			return
		case <-d.state.changes.kick:
		}
		since, had := time.Now(), d.arrived()
		for d.state.changes.dirty.Load() {
			timer.Reset(saveEvery)
			select {
			case <-d.closing:
				return
			case <-timer.C:
			}
			if !d.state.changes.dirty.Load() {
				break // a flush has saved it
			}
			if time.Since(since) < saveLatest && d.arrived()-had < saveWorth {
				continue
			}
			since, had = time.Now(), d.arrived()
			err := d.renewWitness(context.Background(), false)
			var room *roomError
			switch {
			case errors.As(err, &room):
				if now := time.Now(); now.Sub(told) >= time.Minute {
					told = now
					d.log.Warn("there is no room for the map: what has arrived may have to be sent again after a crash, and flushes fail with ENOSPC; make room", "error", err)
				}
			case err != nil:
				return // said where it was noted
			}
		}
	}
}
