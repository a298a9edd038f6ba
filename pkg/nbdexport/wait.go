package nbdexport

import (
	"context"
	"time"
)

// waiter is the context of a request. A backend that asks it for Done is about
// to wait; from then on the request does not hold up others.
type waiter struct {
	r     *request
	done  chan struct{} // nil until asked for; made anew after it was closed
	timer *time.Timer   // for the stall rule; made with done

	// Guarded by conn.mu:
	waiting bool
	ended   errno // why the wait was given up; ok while it was not
	since   time.Time
	bytes   int64 // counted in conn.waitingBytes
	logged  int   // of stallLog
}

var _ context.Context = (*waiter)(nil)

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

// Value says that there are none.
func (w *waiter) Value(any) any { return nil }

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

// Done marks the request as waiting. The channel is closed when the wait is to
// be given up.
func (w *waiter) Done() <-chan struct{} {
	r := w.r
	c := r.c
	if r.word != 0 && c.end(r.word) {
		c.promote()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.done == nil {
		w.done = make(chan struct{})
	}
	if w.waiting {
		return w.done
	}
	w.waiting, w.since, w.logged = true, time.Now(), 0
	c.waiters = append(c.waiters, r)
	w.bytes = r.charged
	c.waitingBytes += w.bytes
	if r.charged > 0 && r.from == &c.s.budget && c.s.waiting.try(r.charged) {
		r.from = &c.s.waiting
		c.s.budget.release(r.charged)
	}
	switch {
	case c.dead.Load():
		w.cancelLocked(errNotServed)
	case c.stopping:
		w.cancelLocked(errShutdown)
	default:
		w.armLocked()
		c.room.Signal()
	}
	return w.done
}

// cancelLocked ends the wait of a request that waits.
func (w *waiter) cancelLocked(err errno) {
	if w.ended == ok {
		w.ended = err
		close(w.done)
	}
}

// endLocked is the end of the request, or of a part of it.
func (w *waiter) endLocked() {
	if !w.waiting {
		return
	}
	c := w.r.c
	for i, r := range c.waiters {
		if r == w.r {
			last := len(c.waiters) - 1
			c.waiters[i], c.waiters[last] = c.waiters[last], nil
			c.waiters = c.waiters[:last]
			break
		}
	}
	c.waitingBytes -= w.bytes
	if w.timer != nil && !w.timer.Stop() {
		w.timer, w.r.spent = nil, true
	}
	if w.ended != ok {
		w.done = nil // it is closed
	}
	w.waiting, w.ended = false, ok
	c.room.Signal()
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
