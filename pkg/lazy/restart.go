package lazy

import "sync/atomic"

// Restart takes back every block: what is here came from another disk, or from
// other contents of it, than what comes from now on. It is for a device in
// standby, where nothing was written yet: else it is refused with ErrLive. When
// it returns nil, that is durable, and the map says that it is for generation
// generation of the disk source. A crash meanwhile leaves nothing of the old
// contents that counts, under the old name or the new one. If there is no room for
// that (NoRoom) it must be tried again; nothing that comes is taken before.
func (d *Device) Restart(source UUID, generation uint64) error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	if d.revocable {
		return ErrLive // its blocks may have been written here
	}
	all := span{0, d.state.blocks}
	if err := d.invalidate(all.lo, all.hi); err != nil {
		return err
	}
	return d.flush.alone(d, func() error {
		m := d.saver.m
		if m == nil {
			return nil
		}
		// By a sync of its own: with the new name and the old bits the map would lie.
		if err := d.forgetOwed([]span{all}, func(*header) {}); err != nil {
			return err
		}
		return mayRetry(m.update(func(h *header) {
			h.id.Source, h.id.Generation = source, generation
			h.bond.flags &^= bondCompare
		}))
	})
}

// Renew makes it durable that what is here is of generation generation of the disk
// source: it was compared, as Map.Compare may have asked for. All that is here stays. If there is no room for that
// (NoRoom), nothing has changed, and it may be tried again.
func (d *Device) Renew(source UUID, generation uint64) error {
	if !d.ops.enter() {
		return ErrClosed
	}
	defer d.ops.leave()
	return d.flush.alone(d, func() error {
		if d.saver.m == nil {
			return nil
		}
		return mayRetry(d.saver.m.update(func(h *header) {
			h.id.Source, h.id.Generation = source, generation
			h.bond.flags &^= bondCompare
		}))
	})
}

// forget makes it durable that the blocks of spans were taken back. Until then
// nothing that comes for them may be laid over their durable contents.
func (d *Device) forget(spans []span) error {
	if len(spans) == 0 {
		return nil
	}
	if !d.mapped {
		d.epoch.step()
		return nil
	}
	return d.flush.alone(d, func() error {
		if d.saver.m == nil {
			return nil
		}
		return d.forgetOwed(append(spans, d.owed.spans...), func(h *header) { h.epoch.step() })
	})
}

// owed is what was taken back in memory and not in the map, for want of room.
type owed struct {
	any   atomic.Bool // there are some
	spans []span      // touched by the holder of both turns of the flusher only
}

// forgetOwed has the map forget spans, with a change of the header that may become
// durable before them, or remembers them if there is no room.
func (d *Device) forgetOwed(spans []span, change func(h *header)) error {
	spans = merged(spans)
	err := mayRetry(d.saver.m.forget(spans, func(h *header) {
		change(h)
		h.bond.drop(within(spans))
	}))
	switch {
	case err == nil:
		d.owed.spans = nil
		if w := d.witness.watch.Load(); w != nil {
			d.witness.watch.Store(w.without(within(spans)))
		}
	case noRoom(err):
		d.owed.spans = spans
	}
	d.owed.any.Store(len(d.owed.spans) > 0)
	return err
}

// payOwed has the map forget what is owed, before anything is laid over what it
// still says to be here: after a power cut that would be a mixture.
func (d *Device) payOwed() error {
	if !d.owed.any.Load() {
		return nil
	}
	return d.flush.alone(d, func() error {
		if d.saver.m == nil || len(d.owed.spans) == 0 {
			return nil
		}
		return d.forgetOwed(d.owed.spans, func(*header) {})
	})
}

// goLive makes it durable that the source has handed over.
func (s *saver) goLive() error {
	if s.m == nil {
		return nil
	}
	return mayRetry(s.m.update(func(h *header) {
		if h.state < MapLive {
			h.state = MapLive
			h.epoch.step()
		}
	}))
}

// mayRetry makes a write of the map that found no room one that may be tried again.
func mayRetry(err error) error {
	if noRoom(err) {
		return &roomError{err}
	}
	return err
}
