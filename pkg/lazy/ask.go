package lazy

import "time"

// The side of waits that talks to the source.

func (w *waits) kickLocked() {
	if w.cur != nil {
		wake(w.cur.kick)
	}
}

func (w *waits) current() *Stream {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cur
}

// attach makes s the session that is asked, for all that is wanted.
func (w *waits) attach(d *Device, s *Stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cur, w.curSince = s, time.Now()
	for block, k := range w.wants {
		switch {
		case k.readers == 0: // nobody waits, and the new source does not know of it
			w.aheads--
			w.forgetLocked(block)
		case !d.state.isLocal(block):
			w.ask.add(block, block+1)
		}
	}
	w.kickLocked()
}

func (w *waits) detach(s *Stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cur == s {
		w.cur, w.curSince = nil, time.Now()
	}
}

// askLoop tells the source what is needed and what is not, until the session is
// over. It holds no lock meanwhile, and nobody waits for it but Close.
func (s *Stream) askLoop() {
	for range s.kick {
		for {
			ask, r, ok := s.d.waits.next(s)
			if !ok {
				break
			}
			off, _ := s.d.extent(r.lo)
			_, end := s.d.extent(r.hi - 1)
			if ask {
				s.src.NeedAt(off, end-off)
			} else {
				s.src.DontNeedAt(off, end-off)
			}
		}
		if s.ops.isShut() {
			return
		}
	}
}

// next takes what the source of s is to be told next: what is needed before what
// is not.
func (w *waits) next(s *Stream) (ask bool, r span, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cur != s {
		return false, span{}, false
	}
	// A block that is in both is asked for twice, by itself and in the prefetch:
	// a source may think less of a long range.
	for _, set := range []*runset{&w.ask, &w.later} {
		if r, ok := takeMissing(set, s.d.state); ok {
			w.asked++
			return true, r, true
		}
	}
	lo, hi, ok := w.tell.take()
	return false, span{lo, hi}, ok
}

// takeMissing takes a run out of set. What has arrived meanwhile is left out.
func takeMissing(set *runset, state *state) (r span, ok bool) {
	for {
		lo, hi, ok := set.take()
		if !ok {
			return span{}, false
		}
		if lo = state.nextMissing(lo, hi); lo == hi {
			continue
		}
		end := state.nextLocal(lo+1, hi) // lo may have arrived since: no matter
		set.add(end, hi)
		return span{lo, end}, true
	}
}
