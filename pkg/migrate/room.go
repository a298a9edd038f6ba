package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

// A destination whose disk is full is neither broken nor gone: the source holds
// the background, sends a block now and then to see whether there is room again,
// and goes on when it is taken.
const (
	// firstRoomPause and maxRoomPause bound the time from a refusal to the next
	// such block.
	firstRoomPause = time.Second
	maxRoomPause   = 4 * time.Second
	// roomForgotten is how long there was room for the next pause to be the first.
	roomForgotten = time.Minute
	// roomLogEvery is how often a line says that there is no room.
	roomLogEvery = time.Minute
)

// ErrFull reports that the destination has no room for more. It is the error of a
// DiskStatus as long as that is so.
var ErrFull = errors.New("the destination has no room for more: its log says where; the migration goes on when there is")

// NoRoom returns an error that is ErrFull if the destination is known to have no room
// for one of the disks: after a handoff its clients' writes would fail. It is for
// whoever calls Handoff; AutoHandoff waits for room by itself.
func (s *Source) NoRoom() error {
	for _, d := range s.disks {
		d.mu.Lock()
		order, connected := d.order, d.connected
		d.mu.Unlock()
		if since, none := order.full(); none && connected {
			return fmt.Errorf("disk %q, for %v: %w", d.Name, time.Since(since).Round(time.Second), ErrFull)
		}
	}
	return nil
}

// room is what an order knows of the room at the destination. It is guarded by
// the order's mu.
type room struct {
	none    bool      // the last answer that told was that there is none
	since   time.Time // when there began to be none
	probing bool      // a block is on its way to see whether there is again
	held    bool      // nothing of the background may go
	due     time.Time // when a block may
	pause   time.Duration
}

// noRoom notes that flying blocks were refused because the destination is full.
// They are pending again, for as long as it takes. What of them was asked for is
// asked for again by whoever waits for it, unless he came just after the block
// did: for him it is a hint.
func (o *order) noRoom(s span, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out -= o.flying.clearRange(s.from, s.to)
	for b := s.from; b < s.to; b++ {
		delete(o.attempts, b)
		if _, ok := o.unneeded[b]; ok {
			delete(o.unneeded, b)
			continue
		}
		o.pending.set(b)
		o.left++
		if o.asked.get(b) {
			o.hints.push(span{b, b + 1})
		}
	}
	o.asked.clearRange(s.from, s.to)
	o.cursor = min(o.cursor, s.from)
	r := &o.room
	switch {
	case !r.none && now.Sub(r.due) > roomForgotten:
		r.pause = firstRoomPause
	case !r.none || !now.Before(r.due): // not one of many that were under way together
		r.pause = min(2*r.pause, maxRoomPause)
	}
	if !r.none {
		r.since = now
	}
	r.none, r.held, r.probing, r.due = true, true, false, now.Add(r.pause)
	o.settleLocked()
	notify(o.bulkWake) // which looks when the next one is due
}

// roomLocked notes that the destination has taken something.
func (o *order) roomLocked() {
	if o.room.none {
		o.room.none, o.room.held, o.room.probing = false, false, false
		notify(o.bulkWake)
	}
}

// probeLocked lets a block go when one is due, and returns how long it is until
// then; 0 if nothing is to be waited for.
func (o *order) probeLocked(now time.Time) (next time.Duration) {
	r := &o.room
	if !r.none || r.probing {
		return 0
	}
	if next = r.due.Sub(now); next > 0 {
		return next
	}
	r.held = false
	return 0
}

// full says since when the destination has had no room; false if it has.
func (o *order) full() (since time.Time, none bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.room.since, o.room.none
}

// sayFull says in the log, now and then, that the destination has no room.
func (p *pump) sayFull() {
	since, none := p.order.full()
	if now := time.Now(); none && now.Sub(p.toldFull) >= roomLogEvery {
		p.toldFull = now
		p.log.Warn("the destination has no room: waiting until there is; its log says where",
			"disk", p.disk.Name, "for", now.Sub(since).Round(time.Second))
	}
}

// shortage is what a destination's disk knows of its own want of room.
type shortage struct {
	err    error     // nil: there is none
	since  time.Time // when it began
	told   time.Time // when the log was told last
	local  int64     // bytes that were here at the last refusal
	untold bool      // the log does not know yet that there is room again
}

// short notes that something found no room, says so now and then, and returns
// the error that tells the source.
func (d *destDisk) short(err error) error {
	d.mu.Lock()
	now := time.Now()
	if d.shortage.err == nil {
		d.shortage.since = now
	}
	tell := now.Sub(d.shortage.told) >= roomLogEvery
	if tell {
		d.shortage.told, d.shortage.untold = now, true
	}
	since := d.shortage.since
	d.shortage.err, d.shortage.local = err, d.dev.Stats().BytesLocal
	d.mu.Unlock()
	if tell {
		d.log.Warn("no room: the migration waits, and goes on by itself when there is; clients that write get ENOSPC until then; make room",
			"disk", d.name, "file", d.file(err), "bytes_needed_at_most", d.geo.size-d.dev.Stats().BytesLocal,
			"for", now.Sub(since).Round(time.Second), "error", err)
	}
	return fmt.Errorf("%w: %w", protocol.ErrNoRoom, err)
}

// file names what there is no room for.
func (d *destDisk) file(err error) string {
	if lazy.MapFull(err) {
		return d.store.Map.Path()
	}
	if f, ok := d.store.Store.(interface{ Path() string }); ok {
		return f.Path()
	}
	return d.name
}

// roomy notes that data has found room, and says so if the log thinks otherwise.
// Data that was here already, and came once more, has needed none.
func (d *destDisk) roomy() {
	d.mu.Lock()
	found := d.shortage.err != nil && d.dev.Stats().BytesLocal > d.shortage.local
	d.mu.Unlock()
	if found {
		d.roomFound()
	}
}

// roomFound notes that what found no room has found some.
func (d *destDisk) roomFound() {
	d.mu.Lock()
	since, tell := d.shortage.since, d.shortage.untold
	d.shortage.err, d.shortage.untold = nil, false
	d.mu.Unlock()
	if tell {
		d.log.Info("there is room again", "disk", d.name, "after", time.Since(since).Round(time.Second))
	}
}

// withRoom does what changes the map, again and again while there is no room for
// that, until gone.
func (d *destDisk) withRoom(gone <-chan struct{}, do func() error) error {
	for pause := firstRoomPause; ; pause = min(2*pause, maxRoomPause) {
		err := do()
		if !lazy.NoRoom(err) {
			if pause > firstRoomPause {
				d.roomFound()
			}
			return err
		}
		_ = d.short(err) // the source waits for its answer, and hears nothing else
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-gone:
			t.Stop()
			return err
		}
	}
}
