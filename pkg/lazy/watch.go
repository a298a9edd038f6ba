package lazy

import (
	"log/slog"
	"time"
)

// stallAfter is when a wait is logged; after the last, once a minute.
var stallAfter = [...]time.Duration{5 * time.Second, 30 * time.Second, time.Minute}

// retryAfter is when a block is asked for again that the disk refused.
const retryAfter = time.Second

// stallAt is how long the oldest wait has lasted when the n-th line is logged.
func stallAt(n int) time.Duration {
	if n < len(stallAfter) {
		return stallAfter[n]
	}
	return stallAfter[len(stallAfter)-1] * time.Duration(n-len(stallAfter)+2)
}

// stallsDue is how many lines are due about a wait that has lasted so long.
func stallsDue(waited time.Duration) (n int) {
	for waited >= stallAt(n) {
		n++
	}
	return n
}

// watchLoop makes waiting visible: one goroutine and one timer a device, however
// many wait. It also asks again for what the disk refused.
func (d *Device) watchLoop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var last stall // the oldest wait when we last looked
	logged := 0    // lines about it, also those that were due before it was the oldest
	for {
		select {
		case <-d.closing:
			return
		case <-d.waits.watch:
		case <-timer.C:
		}
		now := time.Now()
		d.waits.askRefused(now)
		at, retry, ok := d.waits.oldest()
		next := now.Add(time.Hour)
		if ok {
			due := stallsDue(now.Sub(at.since))
			if same := at.since.Equal(last.since) && at.off == last.off; same && due > logged || !same && due > 0 && logged == 0 {
				d.logStall(now, at)
			}
			last, logged = at, due
			next = at.since.Add(stallAt(due))
		} else {
			last, logged = stall{}, 0
		}
		if !retry.IsZero() && retry.Before(next) {
			next = retry
		}
		timer.Reset(next.Sub(now))
	}
}

// stall is the oldest wait.
type stall struct {
	since    time.Time
	off      int64
	waiting  int
	attached bool
	changed  time.Time // when the source was attached, or left
	heard    time.Time // when something arrived last; zero if nothing ever did
	why      error     // why the block is not here although it has arrived; nil if it has not
}

func (w *waits) oldest() (at stall, retry time.Time, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.head == nil {
		return stall{}, w.retry, false
	}
	at = stall{since: w.head.since, off: w.head.off, waiting: w.waiting, attached: w.cur != nil, changed: w.curSince}
	at.heard = w.lastHeard()
	for _, s := range w.head.held {
		for block := s.lo; block < s.hi && at.why == nil; block++ {
			at.why = w.wants[block].why
		}
	}
	return at, w.retry, true
}

// lastHeard is when something arrived last; zero if nothing ever did.
func (w *waits) lastHeard() time.Time {
	if ns := w.heard.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

func (d *Device) logStall(now time.Time, at stall) {
	why := "the source has not sent the block"
	switch {
	case !d.isLive.Load():
		why = "the source has not handed over the device"
	case noRoom(at.why):
		why = "the disk has no room for the block, which is asked for again until it has"
	case at.why != nil:
		why = "the disk does not take the block, which is asked for again"
	case !at.attached:
		why = "no source is attached"
	}
	line := []any{
		slog.Int64("block_offset", at.off/d.blockSize*d.blockSize),
		slog.Time("since", at.since),
		slog.Duration("for", now.Sub(at.since).Round(time.Second)),
		slog.Bool("source_attached", at.attached),
		slog.Duration("source_attached_for", now.Sub(at.changed).Round(time.Second)),
		slog.Int("waiting", at.waiting),
	}
	if !at.attached {
		line[4] = slog.Duration("source_gone_for", now.Sub(at.changed).Round(time.Second))
	}
	if !at.heard.IsZero() {
		line = append(line, slog.Duration("source_last_sent", now.Sub(at.heard).Round(time.Second)))
	}
	if at.why != nil {
		line = append(line, slog.Any("error", at.why))
	}
	d.log.Warn("a client waits: "+why, line...)
}
