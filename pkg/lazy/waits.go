package lazy

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// waits is who waits for what, and what is to be asked of the source for it.
//
// A block that somebody waits for has a want. It lives as long as there is a
// reader, whatever becomes of the block and of the session, so a later session
// can be asked again; and any number of readers share it, so the source is asked
// once. Publishers look only at n when nobody waits.
type waits struct {
	blocks int64
	n      atomic.Int64 // wants, so that a publisher need not take the lock

	watch chan struct{} // capacity 1: the watcher has something new to look at
	heard atomic.Int64  // when something arrived last, in nanoseconds since 1970; 0: never

	mu sync.Mutex
	// Guarded by mu. With it held only the locks of the masks are taken:
	cur        *Stream   // the session that is asked, or nil
	curSince   time.Time // since when it is cur, or nobody
	wants      map[int64]*want
	ask        runset // to be asked with NeedAt: somebody waits, or may soon
	later      runset // to be asked with NeedAt after those: prefetches
	tell       runset // to be told with DontNeedAt
	ahead      readAhead
	aheads     int     // wants that only read-ahead holds
	head, tail *waiter // the longest waiting first
	waiting    int
	retry      time.Time // when to ask again for what the disk refused; zero if nothing
	asked      int64     // runs asked for with NeedAt
}

// want is one block that somebody waits for, or that read-ahead asked for.
type want struct {
	readers int
	refused bool          // it arrived, but the disk failed; it is to be asked for again
	why     error         // why it is not here although it has arrived; nil if it has not
	here    chan struct{} // closed when the block has changed; nil if nobody looks
}

// waiter is one call that waits.
type waiter struct {
	off        int64 // of the call, in bytes
	since      time.Time
	held       []span // the blocks whose want counts this waiter
	prev, next *waiter
}

type span struct{ lo, hi int64 }

func (w *waiter) holds(block int64) bool {
	for _, s := range w.held {
		if s.lo <= block && block < s.hi {
			return true
		}
	}
	return false
}

func (w *waits) init(blocks, blockSize int64) {
	w.blocks = blocks
	w.watch = make(chan struct{}, 1)
	w.wants = make(map[int64]*want)
	w.ask.blocks = blocks
	w.later.blocks = blocks
	w.tell.blocks = blocks
	w.curSince = time.Now()
	w.ahead.limit = max(aheadFirst, aheadBytes/blockSize)
}

// wake puts a token into a channel of capacity 1, unless there is one.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// waitLive waits until the device is live.
func (d *Device) waitLive(ctx context.Context, off int64) error {
	if d.isLive.Load() {
		return nil
	}
	w := &waiter{off: off}
	d.waits.enlist(w)
	defer d.waits.delist(w)
	if d.onWait != nil {
		defer d.onWait(ctx)()
	}
	return d.wait(ctx, d.live, off)
}

// waitReadable waits until all of [off, end) is on the disk. What is missing is
// asked for, all of it at once.
func (d *Device) waitReadable(ctx context.Context, off, end int64) error {
	w := &waiter{off: off}
	d.waits.enlist(w)
	defer func() {
		d.demand.observe(time.Since(w.since))
		d.waits.delist(w)
	}()
	told := false
	for {
		here := d.waits.need(d, w, off, end)
		if here == nil {
			return nil
		}
		if d.onWait != nil && !told {
			told = true
			defer d.onWait(ctx)()
		}
		if err := d.wait(ctx, here, off); err != nil {
			return err
		}
	}
}

// wait waits for c, and for the two ways out.
func (d *Device) wait(ctx context.Context, c <-chan struct{}, off int64) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("lazy: gave up waiting at offset %d: %w", off, context.Cause(ctx))
	case <-d.closing:
		return ErrClosed
	}
}

// enlist makes a waiter visible.
func (w *waits) enlist(r *waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r.since = time.Now()
	r.prev = w.tail
	if w.tail != nil {
		w.tail.next = r
	} else {
		w.head = r
		wake(w.watch)
	}
	w.tail = r
	w.waiting++
}

// delist forgets a waiter, and what only it wanted.
func (w *waits) delist(r *waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		w.head = r.next
		if r.next != nil && time.Since(r.since) >= stallAt(0) {
			wake(w.watch) // it was the one that was logged: now another is
		}
	}
	if r.next != nil {
		r.next.prev = r.prev
	} else {
		w.tail = r.prev
	}
	w.waiting--
	for _, s := range r.held {
		for block := s.lo; block < s.hi; block++ {
			k := w.wants[block]
			if k.readers--; k.readers == 0 {
				w.forgetLocked(block)
			}
		}
	}
}

func (w *waits) forgetLocked(block int64) {
	delete(w.wants, block)
	w.ask.remove(block, block+1)
	w.n.Add(-1)
}

// need registers r for every block that is missing of [off, end), asks for those
// that were not asked for, and returns what is closed when the first of them has
// changed; nil if none is missing. It looks at the blocks only after they are
// registered, so no arrival is overlooked.
func (w *waits) need(d *Device, r *waiter, off, end int64) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	lo, hi := d.span(off, end)
	fault := len(r.held) == 0
	asks := false
	for block := d.nextUnreadable(lo, hi, off, end); block < hi; block = d.nextUnreadable(block+1, hi, off, end) {
		if !r.holds(block) {
			asks = w.registerLocked(r, block) || asks
		}
	}
	if fault && len(r.held) > 0 {
		asks = w.readAheadLocked(d, r.held[0].lo, hi) || asks
	}
	if asks {
		w.kickLocked()
	}
	first := d.nextUnreadable(lo, hi, off, end)
	if first == hi {
		return nil
	}
	if !r.holds(first) { // invalidated since we looked: come again
		w.registerLocked(r, first)
		w.kickLocked()
	}
	k := w.wants[first]
	if k.here == nil {
		k.here = make(chan struct{})
	}
	return k.here
}

// registerLocked counts r as a reader of the block and says whether the block
// is to be asked for.
func (w *waits) registerLocked(r *waiter, block int64) (asks bool) {
	if n := len(r.held); n > 0 && r.held[n-1].hi == block {
		r.held[n-1].hi++
	} else {
		r.held = append(r.held, span{block, block + 1})
	}
	k := w.wants[block]
	if k == nil {
		k = &want{}
		w.wants[block] = k
		w.n.Add(1)
		w.ask.add(block, block+1)
		asks = true
	} else if k.readers == 0 {
		w.aheads-- // read-ahead asked for it already
	}
	k.readers++
	return asks
}

// readAheadLocked widens what is asked for after a fault at the blocks [lo, hi).
func (w *waits) readAheadLocked(d *Device, lo, hi int64) (asks bool) {
	from, to := w.ahead.fault(lo, hi)
	for to = min(to, w.blocks); from < to && w.aheads < maxAheads; from++ {
		if w.wants[from] == nil && !d.state.isLocal(from) {
			w.wants[from] = &want{}
			w.n.Add(1)
			w.aheads++
			w.ask.add(from, from+1)
			asks = true
		}
	}
	return asks
}

// prefetch has the missing blocks of [lo, hi) asked for.
func (w *waits) prefetch(d *Device, lo, hi int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for lo = d.state.nextMissing(lo, hi); lo < hi; {
		end := d.state.nextLocal(lo+1, hi)
		w.later.add(lo, end)
		lo = d.state.nextMissing(end, hi)
	}
	w.kickLocked()
}

// changed wakes those who wait for a block of [lo, hi): it has arrived, or more
// of it was written here.
func (w *waits) changed(d *Device, lo, hi int64) {
	if w.n.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.eachLocked(lo, hi, func(block int64, k *want) {
		if k.readers == 0 {
			if d.state.isLocal(block) {
				w.aheads--
				w.forgetLocked(block)
			}
			return
		}
		if d.state.isLocal(block) {
			k.refused, k.why = false, nil
		}
		if k.here != nil {
			close(k.here)
			k.here = nil
		}
	})
}

// eachLocked calls f for every want of [lo, hi), at the cost of the fewer: of
// the wants, or of the blocks.
func (w *waits) eachLocked(lo, hi int64, f func(block int64, k *want)) {
	if hi-lo > int64(len(w.wants)) {
		for block, k := range w.wants {
			if lo <= block && block < hi {
				f(block, k)
			}
		}
		return
	}
	for block := lo; block < hi; block++ {
		if k := w.wants[block]; k != nil {
			f(block, k)
		}
	}
}

// invalidated asks again for the wanted blocks of [lo, hi), which were taken
// back.
func (w *waits) invalidated(d *Device, lo, hi int64) {
	if w.n.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.eachLocked(lo, hi, func(block int64, k *want) {
		if k.readers > 0 && !d.state.isLocal(block) {
			w.ask.add(block, block+1)
		}
	})
	w.kickLocked()
}

// refused notes that [lo, hi) arrived and the disk did not take it. What of it
// is waited for is asked for again, after a while.
func (w *waits) refused(lo, hi int64, err error) {
	if w.n.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.eachLocked(lo, hi, func(_ int64, k *want) {
		k.refused, k.why = true, err
		if w.retry.IsZero() {
			w.retry = time.Now().Add(retryAfter)
			wake(w.watch)
		}
	})
}

// askRefused asks again for what the disk refused.
func (w *waits) askRefused(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.retry.IsZero() || now.Before(w.retry) {
		return
	}
	w.retry = time.Time{}
	for block, k := range w.wants {
		if k.refused {
			k.refused = false
			w.ask.add(block, block+1)
		}
	}
	w.kickLocked()
}

// needless has the source told that it need not send [lo, hi).
func (w *waits) needless(lo, hi int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tell.add(lo, hi)
	w.kickLocked()
}
