package nbdexport

import (
	"math"
	"time"
)

// lead reads requests and runs them. It returns true when another worker leads
// and what this one had to do is done, false when there are no more requests.
func (c *conn) lead() bool {
	size := requestLen
	if c.mode == modeExtended {
		size = extendedRequestLen
	}
	for {
		if !c.hasRoom() {
			if !c.flushLeading() {
				return true
			}
			if !c.waitRoom() {
				return c.stopReading(errHungUp)
			}
		}
		if c.in.buffered() < size {
			if !c.flushLeading() {
				return true
			}
			if err := c.in.fill(size); err != nil {
				return c.stopReading(err)
			}
		}
		r := newRequest(c)
		if err := r.parse(c.in.buf[c.in.r : c.in.r+size]); err != nil {
			r.free()
			return c.stopReading(err)
		}
		if int64(c.in.buffered()-size) < r.payloadLen() && !c.flushLeading() {
			r.free()
			return true // the next leader parses it again
		}
		c.in.r += size
		if r.typ == cmdDisc {
			r.free()
			return c.stopReading(nil)
		}
		if err := r.receive(); err != nil {
			r.free()
			return c.stopReading(err)
		}
		if c.worthWorker(r) {
			c.promote()
			c.run(r)
			c.flush()
			c.retire()
			return true
		}
		began := time.Now()
		word := c.begin()
		r.word = word
		c.run(r) // r is gone
		took := time.Since(began)
		if c.batchFull() {
			c.flush()
		}
		if !c.end(word) {
			c.flush()
			c.retire()
			return true
		}
		c.pace.ran(took)
	}
}

// flushLeading writes the replies gathered. A client that does not take them
// must not keep requests from being read, so another may lead after it: then
// it returns false.
func (c *conn) flushLeading() bool {
	c.mu.Lock()
	nothing := len(c.queue) == 0 || c.writing
	c.mu.Unlock()
	if nothing {
		return true
	}
	word := c.begin()
	c.flush()
	if !c.end(word) {
		c.retire()
		return false
	}
	return true
}

// worthWorker says whether a request is to be run while others are read.
func (c *conn) worthWorker(r *request) bool {
	if r.err != ok {
		return false
	}
	if r.typ != cmdRead && r.typ != cmdWrite || r.length >= bigRequest || r.flags&cmdFlagFUA != 0 && r.typ == cmdWrite {
		return true
	}
	return c.pace.next(c.finished.Load(), c.stuck.Load() && c.stuck.Swap(false))
}

// hasRoom says that another request may be read.
func (c *conn) hasRoom() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hasRoomLocked()
}

func (c *conn) hasRoomLocked() bool {
	return c.active-len(c.waiters) < maxActive && len(c.waiters) < maxWaiting &&
		c.waitingBytes < maxWaitingBytes && c.queued < maxQueued && c.overWaits == 0
}

// roomLocked wakes the leader, which waits for room.
func (c *conn) roomLocked() {
	c.room.Broadcast()
	if c.charging != nil {
		close(c.charging)
		c.charging = nil
	}
}

// chargeLocked charges a request that waits and could not be charged so far. It
// waits for that until something of the connection has changed.
func (c *conn) chargeLocked() {
	changed := make(chan struct{})
	c.charging = changed
	c.mu.Unlock()
	got := c.s.waits.acquire(waitCost, changed)
	c.mu.Lock()
	if c.charging == changed {
		c.charging = nil
	}
	if !got {
		return
	}
	for _, r := range c.waiters {
		if r.wait.place == placeOver {
			r.wait.place = placeCharged
			c.overWaits--
			return
		}
	}
	c.s.waits.release(waitCost) // its wait is over
}

// waitRoom waits for room. It says no when there are no more requests to come.
func (c *conn) waitRoom() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.hasRoomLocked() {
		return !c.ended
	}
	// Nothing is read meanwhile that would show that the client has gone.
	watch := time.AfterFunc(math.MaxInt64, func() {
		if c.gone() {
			c.kill(errHungUp)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.roomLocked() // looks again, and sets the timer
	})
	defer watch.Stop()
	for !c.ended && !c.hasRoomLocked() {
		watch.Reset(lookForClient)
		if c.overWaits > 0 {
			c.chargeLocked()
		} else {
			c.room.Wait()
		}
	}
	return !c.ended
}
