package lazy

import (
	"context"
	"fmt"
)

// logged takes what was written since the last flush, and says whether the log
// can make that durable. Both turns of the flusher are held.
func (d *Device) logged() (b *batch, ok bool) {
	b, all := d.capture.take()
	m := d.saver.m
	if !all || m == nil || m.log == nil {
		return nil, false
	}
	if b.empty() {
		// All that was answered is durable. Without any record a flush is what it
		// would be without a log: what has arrived becomes durable with it.
		return b, m.log.used()
	}
	return b, m.log.fits(b)
}

// log makes durable what logged returned, by the log. The map's turn is held. If
// there is no room nothing is lost: the next flush is an ordinary one.
func (s *saver) log(b *batch) error {
	if b.empty() {
		return nil
	}
	err := s.m.log.append(b)
	if err == nil {
		s.state.changes.touch() // so that the epoch ends when nobody flushes any more
		return nil
	}
	err = s.m.error("write the log of", err)
	if noRoom(err) {
		s.spoil()
		return &roomError{err}
	}
	return err
}

// replay writes to the disk what was flushed and may not be there, as the client
// did that wrote it, and makes it durable with its bits. Nobody has the device
// yet. there says that the page cache is the one that it was written to: all of it is
// there, or something newer. kept says that the mirror knows of it as well, so that it is
// the next flush that makes it durable.
func (d *Device) replay(m *Map, kept, there bool) error {
	if m.header().state != MapLive {
		d.capture.start()
		return m.log.replay(func(record, bool) error { return nil })
	}
	writes := 0
	err := m.log.replay(func(r record, laid bool) error {
		for _, s := range r.ranges {
			n := s.hi - s.lo
			f := fill{p: r.data[:n], off: s.lo, laid: laid || there, redo: true}
			r.data = r.data[n:]
			if err := d.changeRun(context.Background(), f, s.lo, s.hi); err != nil {
				return err
			}
			writes++
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: lay the log over the disk: %w", m.path, err)
	}
	if !kept && (m.log.used() || d.state.changes.dirty.Load()) {
		if err := d.flush.flush(context.Background(), d, true); err != nil {
			return err
		}
	}
	if kept && m.log.used() {
		d.state.changes.touch() // so that the epoch ends when nobody flushes
	}
	if writes > 0 && !there {
		d.log.Debug("flushed writes of the map's log were laid over the disk", "map", m.path, "writes", writes)
	}
	d.capture.start()
	return nil
}
