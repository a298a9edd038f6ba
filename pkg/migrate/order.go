package migrate

import (
	"maps"
	"math/bits"
	"slices"
	"sync"
	"time"
)

const (
	// maxAsks bounds the queue of asked-for ranges. More are not forgotten:
	// they are found again in the bitmap.
	maxAsks = 4096
	// urgentBytes is how much of an ask overtakes everything. What is beyond it
	// (of a prefetch, a very large read) goes before the background, but would
	// keep the short asks waiting, so it is a hint.
	urgentBytes = 1 << 20
	// A block that could not be read or was refused is tried maxAttempts
	// times, after a pause that doubles from firstRetry.
	maxAttempts = 6
	firstRetry  = 100 * time.Millisecond
)

// order decides which block is sent next: asked-for blocks first, in the order
// of asking, then hints, then what goes first of the background, then the rest:
// what follows the last ask, to the end of the disk, and then from its start.
// Each block is pending, flying (sent, no answer yet), delayed (failed, tried
// again later) or settled. The cost of a block does not depend on the size of
// the disk.
type order struct {
	geo geometry

	bulkWake   chan struct{} // capacity 1: there may be something for peekBulk
	urgentWake chan struct{} // capacity 1: the same for nextUrgent
	settledC   chan struct{} // capacity 1: everything may be settled

	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	pending, flying bitmap
	asked           bitmap // somebody waits for this block, which is not settled
	left, out       int64  // blocks pending, blocks flying
	cursor          int64  // where the background goes on
	asks, hints     fifo
	first           []span             // go before the rest, and nobody waits for them; what is left of them
	scanAsked       bool               // an ask did not fit into asks
	delayed         []delayedBlock     // in no order: there are few
	attempts        map[int64]int      // how often a block that is not settled has failed; 0: it was damaged on the way
	unneeded        map[int64]struct{} // flying blocks that are not needed any more
	room            room               // at the destination
	halted          bool               // nothing is taken
	live            *liveOrder         // nil: nobody writes the disk
}

type delayedBlock struct {
	block int64
	due   time.Time
}

func newOrder(geo geometry) *order {
	o := &order{
		geo:        geo,
		bulkWake:   make(chan struct{}, 1),
		urgentWake: make(chan struct{}, 1),
		settledC:   make(chan struct{}, 1),
		pending:    newBitmap(geo.blocks),
		flying:     newBitmap(geo.blocks),
		asked:      newBitmap(geo.blocks),
		left:       geo.blocks,
		attempts:   make(map[int64]int),
		unneeded:   make(map[int64]struct{}),
	}
	o.pending.setAll()
	return o
}

// ask notes that the other side waits for [off, off+length). A range that is
// empty or not on the disk is ignored. A block that was settled is sent once
// more: who asks does not have it.
func (o *order) ask(off, length int64) {
	s, ok := o.geo.touching(off, length)
	if !ok {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if most := max(1, urgentBytes/o.geo.blockSize); s.len() > most {
		o.hintLocked(span{s.from + most, s.to})
		s.to = s.from + most
	} else {
		o.cursor = s.to // who reads here may go on: what follows it is as good as any other block
	}
	fresh := false
	for b := s.from; b < s.to; b++ {
		if o.asked.get(b) {
			continue
		}
		o.asked.set(b)
		delete(o.unneeded, b)
		if o.reviveLocked(b) {
			fresh = true
		}
	}
	if fresh {
		o.pushAskLocked(s)
	}
}

// hintLocked notes a range that goes before the background. Its cost is a word of the
// bitmaps for 64 blocks: a packet of a few bytes may name millions of them.
func (o *order) hintLocked(s span) {
	for from := s.from; from < s.to; {
		mask, next := wordMask(from, s.to)
		w := from >> 6
		fresh := mask &^ (o.pending.words[w] | o.flying.words[w])
		o.pending.words[w] |= fresh
		o.left += int64(bits.OnesCount64(fresh))
		from = next
	}
	for _, d := range o.delayed { // these come back by themselves
		if d.block >= s.from && d.block < s.to && o.pending.get(d.block) {
			o.pending.clear(d.block)
			o.left--
		}
	}
	o.hints.push(s) // a hint that does not fit is only a hint
	notify(o.bulkWake)
}

// reviveLocked makes b pending, also when it was settled before. It is false
// for a block that flies, whose answer is to come, and for one that is delayed,
// which comes back by itself.
func (o *order) reviveLocked(b int64) bool {
	switch {
	case o.pending.get(b):
		return true
	case o.flying.get(b), o.attempts[b] > 0:
		return false
	}
	o.pending.set(b)
	o.left++
	return true
}

func (o *order) pushAskLocked(s span) {
	if !o.asks.push(s) {
		o.scanAsked = true
	}
	notify(o.urgentWake)
}

// drop notes that the blocks wholly inside [off, off+length) are not needed.
func (o *order) drop(off, length int64) {
	s, ok := o.geo.inside(off, length)
	if !ok {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.live != nil {
		o.dropLocked(s, o.live.claimed(s))
	} else {
		o.dropLocked(s, nil)
	}
	notify(o.bulkWake) // the rest may have waited for one of these
	o.settleLocked()
}

// dropLocked notes that the blocks of s are not needed, but for those that are set in
// the words of keep, if that is not nil. Its cost is that of hintLocked.
func (o *order) dropLocked(s span, keep func(word int64) uint64) {
	for from := s.from; from < s.to; {
		mask, next := wordMask(from, s.to)
		w := from >> 6
		if keep != nil {
			mask &^= keep(w)
		}
		o.left -= int64(bits.OnesCount64(o.pending.words[w] & mask))
		o.pending.words[w] &^= mask
		o.asked.words[w] &^= mask
		for v := o.flying.words[w] & mask; v != 0; v &= v - 1 {
			o.unneeded[w<<6+int64(bits.TrailingZeros64(v))] = struct{}{}
		}
		from = next
	}
	dropped := func(b int64) bool {
		return b >= s.from && b < s.to && (keep == nil || keep(b>>6)&(1<<(b&63)) == 0)
	}
	o.delayed = slices.DeleteFunc(o.delayed, func(d delayedBlock) bool { return dropped(d.block) })
	maps.DeleteFunc(o.attempts, func(b int64, _ int) bool { return dropped(b) && !o.flying.get(b) })
}

// nextUrgent takes the next run of at most limit blocks that were asked for,
// and marks them flying.
func (o *order) nextUrgent(limit int64) (span, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.halted {
		s, ok := o.asks.front()
		if !ok {
			return o.scanUrgentLocked(limit)
		}
		b := o.nextAskedLocked(s.from, s.to)
		if b < 0 {
			o.asks.pop()
			continue
		}
		run := o.takeLocked(b, min(s.to, b+limit), true)
		o.asks.setFront(span{run.to, s.to})
		return run, true
	}
	return span{}, false
}

// scanUrgentLocked finds what the queue of asks had no room for.
func (o *order) scanUrgentLocked(limit int64) (span, bool) {
	if !o.scanAsked {
		return span{}, false
	}
	b := o.nextAskedLocked(0, o.geo.blocks)
	if b < 0 {
		o.scanAsked = false
		return span{}, false
	}
	return o.takeLocked(b, b+limit, true), true
}

// nextAskedLocked returns the first block of [from, to) that is both asked for
// and pending, or -1.
func (o *order) nextAskedLocked(from, to int64) int64 {
	for from < to {
		mask, next := wordMask(from, to)
		w := from >> 6
		for v := o.asked.words[w] & o.pending.words[w] & mask; v != 0; v &= v - 1 {
			b := w<<6 + int64(bits.TrailingZeros64(v))
			if o.live == nil || !o.live.stale(b) {
				return b
			}
			o.setAsideLocked(b)
		}
		from = next
	}
	return -1
}

// peekBulk returns the block that the background should send next, and whether
// it is a hint, which somebody waits for.
func (o *order) peekBulk() (block int64, hint, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.halted || o.room.held {
		return 0, false, false
	}
	for {
		s, ok := o.hints.front()
		if !ok {
			break
		}
		if b := o.nextPendingLocked(s.from, s.to); b >= 0 {
			o.hints.setFront(span{b, s.to})
			return b, true, true
		}
		o.hints.pop()
	}
	if len(o.attempts) > 0 {
		b, ok := o.retryLocked()
		return b, false, ok
	}
	for {
		o.nextWaveLocked()
		if b := o.firstLocked(); b >= 0 {
			return b, false, true
		}
		b := o.nextPendingLocked(o.cursor, o.geo.blocks)
		if b < 0 {
			b = o.nextPendingLocked(0, o.geo.blocks)
		}
		switch {
		case b >= 0:
			o.cursor = b
			return b, false, true
		case o.live == nil || o.live.left == 0:
			o.settleLocked() // the last ones may have been set aside
			return 0, false, false
		}
	}
}

// retryLocked returns the first of the blocks that have failed and are due.
// While there are such, or delayed ones, the rest waits: a disk that takes
// nothing shows itself in seconds, whatever its size, and what has failed stays
// little.
func (o *order) retryLocked() (block int64, ok bool) {
	for b := range o.attempts {
		if o.pending.get(b) && (!ok || b < block) {
			block, ok = b, true
		}
	}
	return block, ok
}

// takeBulk takes the run of pending blocks that begins at from, at most limit
// of them, and marks them flying. It is false if from was taken meanwhile.
func (o *order) takeBulk(from, limit int64) (span, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.halted || o.room.held || o.nextPendingLocked(from, from+1) != from {
		return span{}, false
	}
	limit = o.atMostLocked(from, limit)
	if o.room.none {
		o.room.probing, o.room.held = true, true
		limit = 1
	}
	return o.takeLocked(from, from+limit, false), true
}

// takeLocked makes the run of pending (and asked) blocks from from on flying.
// A block that failed before goes alone, so that it cannot take others with it.
// The first of them is not stale.
func (o *order) takeLocked(from, limit int64, onlyAsked bool) span {
	to := o.pending.runEnd(from, limit)
	if onlyAsked {
		to = o.asked.runEnd(from, to)
	}
	if len(o.attempts) > 0 {
		for b := from; b < to; b++ {
			if _, failed := o.attempts[b]; failed {
				to = max(b, from+1)
				break
			}
		}
	}
	if o.live != nil {
		for b := from + 1; b < to; b++ {
			if o.live.stale(b) {
				to = b
				break
			}
		}
		o.live.take(from, to)
	}
	for b := from; b < to; b++ {
		o.pending.clear(b)
		o.flying.set(b)
	}
	o.left -= to - from
	o.out += to - from
	return span{from, to}
}

// done settles blocks that were acknowledged.
func (o *order) done(s span) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out -= o.flying.clearRange(s.from, s.to)
	o.asked.clearRange(s.from, s.to)
	o.roomLocked()
	if len(o.attempts)+len(o.unneeded) > 0 {
		for b := s.from; b < s.to; b++ {
			delete(o.attempts, b)
			delete(o.unneeded, b)
		}
		notify(o.bulkWake) // the rest may go on
	}
	o.settleLocked()
}

// failed notes that flying blocks were not taken. They are tried again after a
// pause; it is false when one of them has been tried often enough.
func (o *order) failed(s span, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out -= o.flying.clearRange(s.from, s.to)
	o.room.probing = false
	again := true
	for b := s.from; b < s.to; b++ {
		if _, ok := o.unneeded[b]; ok {
			delete(o.unneeded, b)
			delete(o.attempts, b)
			continue
		}
		o.attempts[b]++
		again = again && o.attempts[b] < maxAttempts
		// Given up or not, it is not settled.
		o.delayed = append(o.delayed, delayedBlock{b, now.Add(firstRetry << (o.attempts[b] - 1))})
	}
	o.settleLocked()
	notify(o.bulkWake) // which looks when the next one is due
	return again
}

// release makes the delayed blocks that are due pending again, and returns how
// long it is until the next one is, or one may go to a destination without room;
// 0 if none is delayed.
func (o *order) release(now time.Time) (next time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	kept := o.delayed[:0]
	for _, d := range o.delayed {
		if wait := d.due.Sub(now); wait > 0 {
			kept = append(kept, d)
			if next == 0 || wait < next {
				next = wait
			}
			continue
		}
		o.pending.set(d.block)
		o.left++
		if o.asked.get(d.block) {
			o.pushAskLocked(span{d.block, d.block + 1})
		}
	}
	o.delayed = kept
	if probe := o.probeLocked(now); probe > 0 && (next == 0 || probe < next) {
		next = probe
	}
	return next
}

// settled says that every block was acknowledged or is not needed.
func (o *order) settled() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.settledLocked()
}

func (o *order) settledLocked() bool {
	return o.live == nil && o.drainedLocked()
}

func (o *order) settleLocked() {
	switch {
	case o.live == nil:
		if o.drainedLocked() {
			notify(o.settledC)
		}
	case o.drainedLocked(), o.halted && o.out == 0:
		notify(o.live.ended)
	}
}

// unsettled is the number of blocks still to be settled, or more: a dirty block
// that is also on its way counts twice.
func (o *order) unsettled() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.left + o.out + int64(len(o.delayed))
	if l := o.live; l != nil {
		n = min(o.geo.blocks, n+l.left+l.dirt.count.Load())
	}
	return n
}

// notify wakes the one who waits on c, or the next one to look.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is going to look anyway
	}
}

// fifo is a queue of at most maxAsks spans.
type fifo struct {
	ring  []span
	first int
	n     int
}

// push adds s at the end; it is false when there is no room.
func (q *fifo) push(s span) bool {
	if q.n == maxAsks {
		return false
	}
	if q.n == len(q.ring) {
		q.grow()
	}
	q.ring[(q.first+q.n)%len(q.ring)] = s
	q.n++
	return true
}

func (q *fifo) grow() {
	ring := make([]span, max(16, 2*len(q.ring)))
	for i := range q.n {
		ring[i] = q.ring[(q.first+i)%len(q.ring)]
	}
	q.ring, q.first = ring, 0
}

func (q *fifo) front() (span, bool) {
	if q.n == 0 {
		return span{}, false
	}
	return q.ring[q.first], true
}

// setFront replaces the first span by what is left of it.
func (q *fifo) setFront(s span) { q.ring[q.first] = s }

func (q *fifo) pop() {
	q.first = (q.first + 1) % len(q.ring)
	q.n--
}
