package migrate

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

const (
	// damageQuiet is how long nothing was damaged before the next time is told as
	// something new, and damageLogEvery how often it is told if it does not stop.
	damageQuiet    = 10 * time.Second
	damageLogEvery = time.Minute
)

// damage is what was changed on its way to a disk or from it, as checksums tell.
type damage struct {
	mu sync.Mutex
	// Guarded by mu:
	packets int64
	last    time.Time
	told    time.Time
}

// note counts a packet, and tells of the first of a burst.
func (d *damage) note(log *slog.Logger, disk string) {
	now := time.Now()
	d.mu.Lock()
	d.packets++
	n := d.packets
	tell := now.Sub(d.last) >= damageQuiet || now.Sub(d.told) >= damageLogEvery
	d.last = now
	if tell {
		d.told = now
	}
	d.mu.Unlock()
	if tell {
		log.Warn("bytes were changed on the way, as their checksum tells; they are sent again: look at the network",
			"disk", disk, "packets", n)
	}
}

// noteEnd is note for a connection that ended with err, if that was the reason.
func (d *damage) noteEnd(log *slog.Logger, disk string, err error) {
	var refused *protocol.RemoteError
	if errors.Is(err, protocol.ErrDamaged) && !errors.As(err, &refused) {
		d.note(log, disk)
	}
}

func (d *damage) count() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.packets
}

// again notes that flying blocks are wanted once more, at once: it was not the
// destination that failed. They go alone, so that on a bad path they are short.
func (o *order) again(s span) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out -= o.flying.clearRange(s.from, s.to)
	o.room.probing = false
	for b := s.from; b < s.to; b++ {
		if _, ok := o.unneeded[b]; ok {
			delete(o.unneeded, b)
			delete(o.attempts, b)
			continue
		}
		o.pending.set(b)
		o.left++
		o.attempts[b] += 0 // there, and no failure
		if o.asked.get(b) {
			o.pushAskLocked(span{b, b + 1})
		}
	}
	o.cursor = min(o.cursor, s.from)
	o.settleLocked()
	notify(o.bulkWake)
}

// again sends s once more, which was damaged on the way.
func (p *pump) again(s span) {
	p.counts.damage.note(p.log, p.disk.Name)
	p.order.again(s)
}

// awaitAdmission waits until data may be sent to the destination of this connection.
func (p *pump) awaitAdmission(ctx context.Context) error {
	select {
	case <-p.admitted:
		return nil
	case <-p.failed:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
