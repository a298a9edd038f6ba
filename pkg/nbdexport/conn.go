package nbdexport

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a client attached to an export: the transmission phase.
//
// Goroutines of a connection are workers. One of them is the leader: it reads
// requests, and runs them itself as long as they are short. When a request
// waits, or is known to take long, another worker becomes the leader, while
// the first finishes its request.
type conn struct {
	s        *Server
	e        *export
	store    *store
	raw      net.Conn // as it was accepted
	nc       net.Conn // raw, or TLS over it
	flags    uint16   // transmission flags
	mode     replyMode
	contexts []string

	in   *reader   // the leader's
	pipe pipeState // the leader's

	// word tells leaders apart: it grows by one when the leader begins to run
	// something, which makes it odd, and when that has ended. Whoever takes the
	// second step decides: the leader itself, and it leads on; or another on
	// its behalf, and the leader is a leader no more.
	word  atomic.Uint64
	pace  pacer       // the leader's
	stuck atomic.Bool // a leader was found stuck in a request

	finished atomic.Uint64 // requests that have come to their end

	watching atomic.Bool // the watch timer is set
	watch    *time.Timer
	watched  uint64 // the word at the last tick; only the timer's

	role    chan struct{} // takes an idle worker to the lead
	done    chan struct{} // closed by the last leader: no more requests
	drained chan struct{} // closed when no request runs any more and the export is left
	wg      sync.WaitGroup

	allowance atomic.Bool // a request has what is allowed beyond the budget

	mu   sync.Mutex
	room sync.Cond // on mu: there is room for another request, perhaps
	// Guarded by mu:
	active       int           // requests of workers that are not the leader
	idle         int           // workers without a request
	waiters      []*request    // that wait for data
	waitingBytes int64         // charged to them
	freeWaits    int           // of waiters: those that cost nothing
	overWaits    int           // of waiters: those that could not be charged
	asked        []*request    // that look at their context's end
	charging     chan struct{} // closed when there may be room again; nil unless the leader waits for Server.waits
	queue        []*request    // finished, to be answered
	queued       int64         // bytes of the replies, with those being written
	writing      bool          // somebody writes replies
	ended        bool          // no more requests: the client said goodbye, has gone, or is sent away
	stopping     bool          // requests that wait end with ESHUTDOWN
	cause        error         // why it is dead

	dead  atomic.Bool   // what has not begun never begins
	dying chan struct{} // closed with dead

	out writer // of whoever set writing
}

// placeWaiter is a connection that may be waited for in place, and not with the
// runtime's poller, which costs less while much arrives.
type placeWaiter interface{ WaitInPlace() }

func newConn(h *handshake, e *export) *conn {
	c := &conn{
		s: h.s, e: e, store: e.store, raw: h.raw, nc: h.nc, in: h.in, mode: h.mode,
		contexts: h.contextsOf(e),
		role:     make(chan struct{}, 1), done: make(chan struct{}), drained: make(chan struct{}),
		dying: make(chan struct{}),
	}
	c.flags = e.store.flags(e.ReadOnly, c.mode, c.contexts != nil)
	c.room.L = &c.mu
	c.out.init(h.nc)
	return c
}

// serve runs the transmission phase to its end.
func (c *conn) serve() {
	c.s.log.Debug("client attached", "export", c.e.Name, "from", c.raw.RemoteAddr())
	if f := c.s.o.OnConnect; f != nil {
		f(c.e.Name)
	}
	if c.stopped() { // the end of the handshake has lifted the deadlines that stop set
		c.stop()
	}
	c.in.grow(readBuffer)
	if nc, is := c.nc.(placeWaiter); is {
		nc.WaitInPlace()
	}
	c.watch = time.AfterFunc(time.Hour, c.tick)
	c.watch.Stop()
	c.wg.Go(c.workLoop)
	<-c.done // until there is no leader any more, tick may start another worker
	c.wg.Wait()
	c.watch.Stop()
	c.flush() // the last replies; a client that has gone does not get them
	if c.nc != c.raw && !c.dead.Load() {
		c.nc.Close() // TLS says goodbye; whether that arrives changes nothing
	}
	c.finish()
}

// abandon is for a connection that never came to serve.
func (c *conn) abandon() {
	close(c.done)
	c.finish()
}

// finish leaves the export, and tells of it whoever has counted c.
func (c *conn) finish() {
	c.kill(io.EOF)
	c.dropQueue()
	left := c.e.detach(c)
	close(c.drained)
	c.mu.Lock()
	cause := c.cause
	c.mu.Unlock()
	c.s.log.Debug("client left", "export", c.e.Name, "from", c.raw.RemoteAddr(), "why", cause)
	if f := c.s.o.OnDisconnect; f != nil {
		f(c.e.Name, left)
	}
}

// workLoop is the life of a worker, which begins as the leader.
func (c *conn) workLoop() {
	for c.lead() && c.rest() {
	}
}

// rest waits to be made the leader. It says no when the worker is not needed.
func (c *conn) rest() bool {
	c.mu.Lock()
	if c.idle >= maxIdleWorkers || c.ended {
		c.mu.Unlock()
		return false
	}
	c.idle++
	c.mu.Unlock()
	select {
	case <-c.role:
		return true
	case <-c.done:
		return false
	}
}

// promote makes another worker the leader. The caller was, or acts for one,
// and from now on counts as active until it calls retire.
func (c *conn) promote() {
	c.mu.Lock()
	c.active++
	wake := c.idle > 0
	if wake {
		c.idle--
	}
	c.mu.Unlock()
	if wake {
		c.role <- struct{}{} // room for one: there is only one leader
		return
	}
	c.wg.Go(c.workLoop)
}

// retire is the end of what a worker did after it was the leader.
func (c *conn) retire() {
	c.mu.Lock()
	c.active--
	last := c.active == 0 && c.ended
	c.roomLocked()
	c.mu.Unlock()
	if last {
		c.raw.SetReadDeadline(time.Now()) // wakes linger, which waits for nothing else
	}
}

// begin marks the leader as running something; end says whether it still leads.
func (c *conn) begin() (word uint64) {
	word = c.word.Add(1)
	if !c.watching.Load() && c.watching.CompareAndSwap(false, true) {
		c.watch.Reset(stuckAfter)
	}
	return word
}

func (c *conn) end(word uint64) bool { return c.word.CompareAndSwap(word, word+1) }

// tick looks whether the leader is stuck in a request.
func (c *conn) tick() {
	word := c.word.Load()
	switch same := word == c.watched; {
	case same && word&1 == 0:
		c.watching.Store(false) // quiet: begin sets the timer again
		if c.word.Load() == word || !c.watching.CompareAndSwap(false, true) {
			return
		}
	case same:
		if c.end(word) {
			c.stuck.Store(true)
			c.promote()
		}
	}
	c.watched = word
	c.watch.Reset(stuckAfter)
}

// stopReading is the end of the last leader: the client said goodbye (nil), or
// err is what became of it.
func (c *conn) stopReading(err error) bool {
	c.pipe.close() // with what is left of a payload, which is not charged any more
	c.mu.Lock()
	c.ended = true
	stopped := c.stopping && errors.Is(err, os.ErrDeadlineExceeded)
	c.mu.Unlock()
	close(c.done)
	switch {
	case err == nil, stopped:
		c.linger()
	default:
		c.kill(err)
	}
	return false
}

// linger notices when a client that said goodbye goes away while its requests
// run: nobody waits for them any more. It reads whatever comes.
func (c *conn) linger() {
	c.mu.Lock()
	alone := c.active == 0
	c.mu.Unlock()
	c.flush()
	if alone {
		return
	}
	for {
		c.in.r, c.in.w = 0, 0
		if err := c.in.fill(1); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				c.kill(err)
			}
			return
		}
	}
}

// stop lets what runs finish and sends the client away.
func (c *conn) stop() {
	c.mu.Lock()
	c.stopping = true
	ended := c.ended
	for _, r := range c.waiters {
		r.wait.cancelLocked(errShutdown)
	}
	c.roomLocked()
	c.mu.Unlock()
	if !ended {
		c.raw.SetReadDeadline(time.Now())
	}
	c.raw.SetWriteDeadline(time.Now().Add(byeTime))
}

// kill ends the connection at once: what has not begun never begins, and what
// waits is given up. It does not wait for what runs.
func (c *conn) kill(err error) {
	c.mu.Lock()
	if c.dead.Load() {
		c.mu.Unlock()
		return
	}
	c.cause = err
	c.ended = true
	c.dead.Store(true)
	close(c.dying)
	waiting, longest := 0, time.Duration(0)
	if !c.stopping && err != errClosed { // it is not we who send it away
		for _, r := range c.waiters {
			waiting++
			longest = max(longest, time.Since(r.wait.since))
		}
	}
	for _, r := range c.waiters {
		r.wait.cancelLocked(errNotServed)
	}
	for _, r := range c.asked {
		r.wait.cancelLocked(errNotServed)
	}
	c.roomLocked()
	c.mu.Unlock()
	c.raw.Close() // there is nobody left to care for an error
	if longest >= stallLog[0] {
		c.s.log.Warn("client left while its requests waited for data: if it has a timeout of its own, let it be longer than an outage may last",
			"export", c.e.Name, "from", c.raw.RemoteAddr(), "requests", waiting, "waited", longest.Round(time.Second))
	}
}

// stopped says that the server ends.
func (c *conn) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopping
}

// gone says that the client has hung up, also when what it sent before is not
// read yet.
func (c *conn) gone() bool { return c.dead.Load() || hungUp(c.raw) }

// waits is how many requests wait, since when the oldest, and where.
func (c *conn) waits() (n int, since time.Time, off int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.waiters {
		if since.IsZero() || r.wait.since.Before(since) {
			since, off = r.wait.since, int64(r.off)
		}
	}
	return len(c.waiters), since, off
}
