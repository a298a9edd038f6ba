package migrate

import (
	"context"
	"time"
)

const (
	// A lane lags when a packet of it takes longer than lagFactor times the least
	// round trip of the path and lagSlack, and for lagLife after. Its disk at the
	// destination is busy or stands still, and not the path.
	lagFactor = 4
	lagSlack  = 10 * time.Millisecond
	lagLife   = time.Second
	// A lane that lags may have lagShare-th of the window in flight, at least two
	// packets.
	lagShare = 8
)

// lane is the part of one disk in the window of its connection. What a disk that
// lags has in flight does not count for the others: it waits in the memory that the
// destination has for that disk, and not on the path. So a disk that stands still
// holds up no other. A lane is used by one goroutine, apart from release.
type lane struct {
	*window

	timer *time.Timer // of await
	// Guarded by the window's mu:
	bytes, packets int64     // in flight
	heardAt        time.Time // when the last of them was answered, or the first sent
	wantedAt       time.Time // when it asked for room last
	lateAt         time.Time // when it was last seen to lag; zero: never
}

// lane returns a new lane of the window.
func (w *window) lane() *lane {
	l := &lane{window: w}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lanes = append(w.lanes, l)
	return l
}

// await waits until the next packet may be sent and returns its bytes, as size
// has them then: what is right for a packet changes while it waits.
func (l *lane) await(ctx context.Context, size func() int64) (n int64, err error) {
	for {
		n = size()
		wake, look := l.room(n)
		if wake == nil {
			return n, nil
		}
		var due <-chan time.Time
		if look > 0 {
			due = l.alarm(look)
		}
		select {
		case <-wake:
		case <-due:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// alarm is a timer that is made once: nothing is allocated for a packet.
func (l *lane) alarm(d time.Duration) <-chan time.Time {
	if l.timer == nil {
		l.timer = time.NewTimer(d)
	} else {
		l.timer.Reset(d)
	}
	return l.timer.C
}

// room returns nil if n bytes may be sent, and otherwise what is closed when that
// may have changed, and when to look again in any case, if not 0: no word comes of
// another lane that falls silent.
func (l *lane) room(n int64) (wake <-chan struct{}, look time.Duration) {
	w := l.window
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	l.wantedAt = now
	if w.roomLocked(l, n, now) {
		return nil, 0
	}
	if w.wake == nil {
		w.wake = make(chan struct{})
	}
	for _, other := range w.lanes {
		if other == l || other.packets == 0 || other.silentLocked(now) {
			continue
		}
		if left := other.heardAt.Add(w.lateLocked()).Sub(now) + 1; look == 0 || left < look {
			look = max(1, left)
		}
	}
	return w.wake, look
}

// begin counts n bytes as sent now, whether there is room for them or not.
func (l *lane) begin(n int64) flightMark {
	w := l.window
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sendLocked(l, n, time.Now())
}

// release takes a packet out of flight. Only one that was taken by the other
// side (ok) and whose cost is its bytes measures the path.
func (l *lane) release(m flightMark, ok bool) {
	w := l.window
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	l.packets--
	l.bytes -= m.bytes
	l.heardAt = now
	if m.bytes > 0 && w.minRTT > 0 && now.Sub(m.sentAt) > w.lateLocked() {
		l.lateAt = now
	}
	if ok && m.bytes > 0 {
		w.measureLocked(m, now)
	}
	w.wakeLocked()
}

// lateLocked is how long a packet takes of which the disk is what is slow. Until the
// path is known it is long.
func (w *window) lateLocked() time.Duration {
	if w.minRTT == 0 {
		return time.Second
	}
	return lagFactor*w.minRTT + lagSlack
}

// silentLocked reports whether the lane waits for answers for longer than the path needs.
func (l *lane) silentLocked(now time.Time) bool {
	return l.packets > 0 && now.Sub(l.heardAt) > l.lateLocked()
}

// lagsLocked reports whether the lane's disk does not answer as the path does, or did
// not of late.
func (l *lane) lagsLocked(now time.Time) bool {
	if l.silentLocked(now) {
		l.lateAt = now
	}
	return !l.lateAt.IsZero() && now.Sub(l.lateAt) < lagLife
}

// laggards tells the lanes whose packets do not count for the others. If all lanes that
// have something to send are late, it is the path, and each counts.
type laggards struct {
	now        time.Time
	heard, fit bool // there is a lane that is not silent, and one that does not lag
}

func (w *window) laggardsLocked(now time.Time) laggards {
	g := laggards{now: now}
	if len(w.lanes) == 1 {
		return g
	}
	for _, l := range w.lanes {
		if l.packets > 0 || now.Sub(l.wantedAt) < lagLife {
			g.heard = g.heard || !l.silentLocked(now)
			g.fit = g.fit || !l.lagsLocked(now)
		}
	}
	return g
}

func (g laggards) hasLocked(l *lane) bool {
	return g.heard && l.silentLocked(g.now) || g.fit && l.lagsLocked(g.now)
}

// flyingLocked is what is in flight as far as the lane is concerned: its own, and
// that of the others which counts. apart is true if its own does not count for them.
func (w *window) flyingLocked(l *lane, now time.Time) (bytes, packets int64, apart bool) {
	bytes, packets = l.bytes, l.packets
	g := w.laggardsLocked(now)
	for _, other := range w.lanes {
		if other != l && other.packets > 0 && !g.hasLocked(other) {
			bytes, packets = bytes+other.bytes, packets+other.packets
		}
	}
	return bytes, packets, g.hasLocked(l)
}

// roomLocked reports whether n more bytes of the lane may fly. One packet always may.
func (w *window) roomLocked(l *lane, n int64, now time.Time) bool {
	if !w.packetsLocked(l) {
		return false
	}
	bytes, packets, apart := w.flyingLocked(l, now)
	limit := w.limitLocked()
	if apart && l.packets > 0 && n > 0 && l.bytes+n > max(limit/lagShare, 2*w.packetLocked()) {
		return false
	}
	switch {
	case packets == 0:
		return true
	case n == 0: // measures nothing, so it cannot end a probe either
		return packets < int64(w.maxPackets)
	}
	if w.probing && now.Sub(w.probingAt) > max(probeLife, 4*w.minRTT) {
		w.probing, w.minRTTAt = false, now
	}
	return !w.probing && packets < int64(w.maxPackets) && bytes+n <= limit
}

// packetsLocked reports whether a plain Silo destination takes one more packet of the
// lane: it has so many for all disks, and one that stands still keeps its own.
func (w *window) packetsLocked(l *lane) bool {
	if w.maxPackets > plainBulkPackets || len(w.lanes) == 1 {
		return true
	}
	var all int64
	for _, other := range w.lanes {
		all += other.packets
	}
	return all < int64(w.maxPackets) && l.packets < max(1, int64(w.maxPackets/len(w.lanes)))
}

func (w *window) sendLocked(l *lane, n int64, now time.Time) flightMark {
	_, flying, apart := w.flyingLocked(l, now)
	alone := flying == 0 && !apart
	if alone {
		w.deliveredAt = now // an idle path has no rate
	}
	if l.packets == 0 {
		l.heardAt = now
	}
	l.packets++
	l.bytes += n
	return flightMark{
		bytes: n, sentAt: now, delivered: w.delivered, deliveredAt: w.deliveredAt,
		probe: alone && w.probing,
	}
}
