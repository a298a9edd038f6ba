package migrate

// liveOrder is what an order knows more of a disk that is still being written.
// The order's lock guards it.
//
// A block that is dirty and that the destination may hold is stale: it is not
// sent, since a block is never sent over itself (trap M13). It waits until a
// DirtyList that names it was answered: collect and listed. From then on the
// destination does not hold it, and it goes with the next pass. A mark is
// cleared only when a block is taken that the destination does not hold. So a
// block that is clean is at the destination as it is here, or on its way, or not
// there at all.
type liveOrder struct {
	dirt *dirt
	// holds are the blocks that the destination may hold: all of them until it
	// is known what it claims, then what it claimed or was sent, but for what was
	// taken back since.
	holds bitmap
	seen  bitmap // claimed or sent on this connection
	known bool   // what the destination claims is known
	later []bitmap
	left  int64 // blocks in later
	ended chan struct{}

	askedStale bool // somebody at the destination asked for a stale block
}

// newLiveOrder is an order for a disk that is written meanwhile. On ended,
// which has capacity 1, it says that a pass may have ended.
func newLiveOrder(geo geometry, d *dirt, ended chan struct{}) *order {
	o := newOrder(geo)
	l := &liveOrder{dirt: d, holds: newBitmap(geo.blocks), seen: newBitmap(geo.blocks), ended: ended}
	l.holds.setAll()
	o.live = l
	return o
}

func (l *liveOrder) stale(block int64) bool {
	return l.dirt.get(block) && l.holds.get(block)
}

// claimed notes that the destination claims the blocks of s, and returns a word of
// those that are not as they are here: they do not count as claimed (trap M14).
func (l *liveOrder) claimed(s span) (dirty func(word int64) uint64) {
	l.holds.setRange(s.from, s.to)
	l.seen.setRange(s.from, s.to)
	return func(word int64) uint64 { return l.dirt.dirty[word].Load() }
}

// take makes [from, to), which is about to be read and sent, clean. What the
// destination may hold stays dirty if it became so this instant: what is sent
// of it now does not count.
func (l *liveOrder) take(from, to int64) {
	for b := from; b < to; b++ {
		if !l.holds.get(b) {
			l.dirt.clear(b)
		}
		l.holds.set(b)
		l.seen.set(b)
	}
}

// learned notes that all claims of the destination have come.
func (o *order) learned() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := o.live; l != nil && !l.known {
		l.known = true
		l.holds = l.seen.clone()
		notify(o.bulkWake)
		notify(o.urgentWake)
	}
}

// setAsideLocked leaves a stale block to the next pass.
func (o *order) setAsideLocked(b int64) {
	o.pending.clear(b)
	o.left--
	delete(o.attempts, b)
	if o.asked.get(b) {
		o.live.askedStale = true
		notify(o.live.ended)
	}
}

// nextPendingLocked is the first pending block of [from, to) that can be sent,
// or -1.
func (o *order) nextPendingLocked(from, to int64) int64 {
	b := o.pending.nextIn(from, to)
	for o.live != nil && b >= 0 && o.live.stale(b) {
		o.setAsideLocked(b)
		b = o.pending.nextIn(b+1, to)
	}
	return b
}

// nextWaveLocked makes the next part of the pass pending, when nothing is.
func (o *order) nextWaveLocked() {
	for l := o.live; l != nil && o.left == 0 && len(l.later) > 0; {
		wave := l.later[0]
		l.later = l.later[1:]
		for b := wave.next(0); b >= 0; b = wave.next(b + 1) {
			l.left--
			if !o.pending.get(b) && !o.flying.get(b) {
				o.pending.set(b)
				o.left++
			}
		}
		o.cursor = 0
	}
}

// drainedLocked says that a pass has nothing left.
func (o *order) drainedLocked() bool {
	return o.left == 0 && o.out == 0 && len(o.delayed) == 0 && (o.live == nil || o.live.left == 0)
}

// drained says that all of the pass was acknowledged or set aside.
func (o *order) drained() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.drainedLocked()
}

// takeAsked says whether stale blocks were asked for since the last call.
func (o *order) takeAsked() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.live
	if l == nil || !l.askedStale {
		return false
	}
	l.askedStale = false
	return true
}

// collect returns the stale blocks, ascending, or of them only those that were
// asked for. They are to be named in a DirtyList, and then given to listed. A
// block that is in flight is left out: its old bytes must not arrive after the
// list (trap M12).
func (o *order) collect(asked bool) []uint32 {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.live == nil {
		return nil
	}
	var list []uint32
	o.live.dirt.dirty.each(func(b int64) {
		switch {
		case o.flying.get(b), asked && !o.asked.get(b):
		case o.live.holds.get(b):
			list = append(list, uint32(b))
		default: // set aside when it was not known what the destination holds
			o.reviveLocked(b)
		}
	})
	notify(o.bulkWake)
	return list
}

// listed notes that the destination has durably forgotten the blocks of list,
// which collect returned: they are sent in the order of their heat.
func (o *order) listed(list []uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.live
	if l == nil || len(list) == 0 {
		return
	}
	l.later = append(l.later, o.wavesLocked(list)...)
	o.nextWaveLocked()
	notify(o.bulkWake)
	o.settleLocked()
}

// wavesLocked sorts blocks that the destination does not hold any more by their
// heat: those that nobody has written for the longest time first, since the
// others will be written again. What was asked for goes at once.
func (o *order) wavesLocked(list []uint32) []bitmap {
	l := o.live
	waves := make([]bitmap, 3)
	for _, n := range list {
		b := int64(n)
		l.holds.clear(b)
		l.seen.clear(b)
		if o.asked.get(b) {
			if o.reviveLocked(b) {
				o.pushAskLocked(span{b, b + 1})
			}
			continue
		}
		if o.pending.get(b) || o.attempts[b] > 0 {
			continue
		}
		heat := l.dirt.heat(b)
		if waves[heat].n == 0 {
			waves[heat] = newBitmap(o.geo.blocks)
		}
		waves[heat].set(b)
		l.left++
	}
	full := waves[:0]
	for _, w := range waves {
		if w.n > 0 {
			full = append(full, w)
		}
	}
	return full
}

// halt keeps blocks from being taken, for a handoff, or ends that.
func (o *order) halt(on bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.halted = on
	if !on {
		notify(o.bulkWake)
		notify(o.urgentWake)
	}
}

// landed says that nothing is in flight.
func (o *order) landed() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.out == 0
}

// putBack makes blocks pending that were taken and not sent.
func (o *order) putBack(s span) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out -= o.flying.clearRange(s.from, s.to)
	o.room.probing = false
	for b := s.from; b < s.to; b++ {
		if _, ok := o.unneeded[b]; ok {
			delete(o.unneeded, b)
			continue
		}
		o.pending.set(b)
		o.left++
	}
	notify(o.bulkWake)
	o.settleLocked()
}

// handOver makes the disk a frozen one: nobody writes it any more, and the
// destination holds nothing that is not as it is here.
func (o *order) handOver() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := o.live; l != nil {
		for _, wave := range l.later {
			for b := wave.next(0); b >= 0; b = wave.next(b + 1) {
				o.reviveLocked(b)
			}
		}
		// A block that is dirty and was not taken yet is pending, or was set aside
		// and never listed: then the destination does not hold it.
		l.dirt.dirty.each(func(b int64) { o.reviveLocked(b) })
		o.live = nil
	}
	o.halted = false
	notify(o.bulkWake)
	notify(o.urgentWake)
	o.settleLocked()
}
