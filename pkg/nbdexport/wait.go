package nbdexport

import (
	"context"
	"time"
)

// waiter is the context of a request. A backend that is about to wait says so by
// Waiting; until the wait is over the request does not hold up others.
type waiter struct {
	r     *request
	done  chan struct{} // nil until asked for; made anew after it was closed
	timer *time.Timer   // for the stall rule; made by the first wait

	// Guarded by conn.mu:
	asked   bool          // Done was called: the request is in conn.asked
	waiting bool          // the request is in conn.waiters
	ended   errno         // why it was given up; ok while it was not
	since   time.Time     // when the wait began, with those of the request before it put in front
	waited  time.Duration // in the waits of the request that are over
	bytes   int64         // counted in conn.waitingBytes
	logged  int           // of stallLog
	place   waitPlace
}

var _ context.Context = (*waiter)(nil)

// waitPlace is what a request that waits is charged to.
type waitPlace int

const (
	placeNone    waitPlace = iota
	placeFree              // one of the few that each connection has
	placeCharged           // waitCost of Server.waits
	placeOver              // nothing: the connection reads no more until it is charged, or over
)

// waiterKey is the key by which Waiting finds the waiter of a context.
type waiterKey struct{}

// Waiting tells the server that the request of ctx waits for something slow, such
// as a network, and not for the disk, until over is called. Meanwhile others are
// served, the wait is counted and logged, Options.StallError bounds it, and the end
// of the server ends it by ctx. Of any other context nobody is told. It must be
// called by the request's goroutine.
func Waiting(ctx context.Context) (over func()) {
	w, is := ctx.Value(waiterKey{}).(*waiter)
	if !is {
		return func() {}
	}
	w.begin()
	return w.over
}

// waitEnded is what the context's Err is.
type waitEnded struct{ err errno }

func (e waitEnded) Error() string {
	switch e.err {
	case errShutdown:
		return "nbdexport: server shuts down"
	case errIO:
		return "nbdexport: waited longer than the stall rule allows"
	}
	return "nbdexport: client has gone"
}

func (e waitEnded) Is(target error) bool { return target == context.Canceled }

// Deadline says that there is none.
func (w *waiter) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value is the waiter itself for Waiting, and nothing else.
func (w *waiter) Value(key any) any {
	if key == (waiterKey{}) {
		return w
	}
	return nil
}

// Err is why the request is not to be waited for any more, or nil.
func (w *waiter) Err() error {
	c := w.r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case w.ended != ok:
		return waitEnded{w.ended}
	case c.dead.Load():
		return waitEnded{errNotServed}
	}
	return nil
}

// Done is closed when the client has gone, or when a wait is to be given up.
func (w *waiter) Done() <-chan struct{} {
	c := w.r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.done == nil {
		w.done = make(chan struct{})
		if w.ended != ok {
			close(w.done)
		}
	}
	if !w.asked {
		w.asked = true
		c.asked = append(c.asked, w.r)
	}
	if c.dead.Load() {
		w.cancelLocked(errNotServed)
	}
	return w.done
}

// begin marks the request as waiting.
func (w *waiter) begin() {
	r := w.r
	c := r.c
	if r.word != 0 && c.end(r.word) {
		c.promote()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.waiting {
		return
	}
	w.waiting, w.since = true, time.Now().Add(-w.waited)
	c.waiters = append(c.waiters, r)
	w.bytes = r.charged
	c.waitingBytes += w.bytes
	if r.charged > 0 && r.from == &c.s.budget && c.s.waiting.try(r.charged) {
		r.from = &c.s.waiting
		c.s.budget.release(r.charged)
	}
	switch {
	case c.freeWaits < freeWaits:
		c.freeWaits++
		w.place = placeFree
	case c.s.waits.try(waitCost):
		w.place = placeCharged
	default:
		c.overWaits++
		w.place = placeOver
	}
	switch {
	case c.dead.Load():
		w.cancelLocked(errNotServed)
	case c.stopping:
		w.cancelLocked(errShutdown)
	default:
		w.armLocked()
		c.roomLocked()
	}
}

// over is the end of a wait. The request may wait again.
func (w *waiter) over() {
	c := w.r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	w.overLocked()
}

func (w *waiter) overLocked() {
	if !w.waiting {
		return
	}
	c := w.r.c
	c.waiters = without(c.waiters, w.r)
	c.waitingBytes -= w.bytes
	switch w.place {
	case placeFree:
		c.freeWaits--
	case placeCharged:
		c.s.waits.release(waitCost)
	case placeOver:
		c.overWaits--
	}
	w.place = placeNone
	if w.timer != nil && !w.timer.Stop() {
		w.timer, w.r.spent = nil, true
	}
	w.waiting, w.waited = false, time.Since(w.since)
	c.roomLocked()
}

// cancelLocked gives up what the request waits for.
func (w *waiter) cancelLocked(err errno) {
	if w.ended != ok {
		return
	}
	w.ended = err
	if w.done != nil {
		close(w.done)
	}
}

// endLocked is the end of the request, or of a part of it.
func (w *waiter) endLocked() {
	w.overLocked()
	if w.asked {
		w.asked = false
		w.r.c.asked = without(w.r.c.asked, w.r)
	}
	if w.ended != ok {
		w.done = nil // it is closed
	}
	w.ended, w.waited, w.logged = ok, 0, 0
}

// without removes a request from some, in any order.
func without(some []*request, r *request) []*request {
	for i := range some {
		if some[i] == r {
			last := len(some) - 1
			some[i], some[last] = some[last], nil
			return some[:last]
		}
	}
	return some
}

// armLocked sets the timer for the next thing to happen to a wait.
func (w *waiter) armLocked() {
	next := time.Duration(-1)
	if w.logged < len(stallLog) {
		next = stallLog[w.logged]
	}
	if limit := w.r.c.s.o.StallError; limit > 0 && (next < 0 || limit < next) {
		next = limit
	}
	if next < 0 {
		return
	}
	next -= time.Since(w.since)
	if w.timer == nil {
		w.timer = time.AfterFunc(next, w.stalled)
		return
	}
	w.timer.Reset(next)
}

// stalled is the timer's: it logs waits that last, and ends them when the
// stall rule says so.
func (w *waiter) stalled() {
	c := w.r.c
	c.mu.Lock()
	if !w.waiting || w.ended != ok {
		c.mu.Unlock()
		return
	}
	waited := time.Since(w.since)
	limit := c.s.o.StallError
	expired := limit > 0 && waited >= limit
	tell := w.logged < len(stallLog) && waited >= stallLog[w.logged]
	if expired {
		w.cancelLocked(errIO)
	} else {
		for w.logged < len(stallLog) && waited >= stallLog[w.logged] {
			w.logged++
		}
		w.armLocked()
	}
	off, length, typ := w.r.off, w.r.length, w.r.typ
	c.mu.Unlock()
	switch {
	case !tell && !expired:
	case c.s.o.OnWait != nil:
		c.s.o.OnWait(Wait{
			Export: c.e.Name, Command: commandName(typ), Off: off, Length: length, Waited: waited, GivenUp: expired,
		})
	default:
		c.s.log.Warn("request waits for data", "export", c.e.Name, "command", commandName(typ), "off", off,
			"length", length, "waited", waited.Round(time.Millisecond), "given_up", expired)
	}
}
