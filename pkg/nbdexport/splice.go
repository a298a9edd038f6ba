package nbdexport

import (
	"time"
)

// pipeState is what a connection has for payloads that go from the socket to the
// backend through a pipe, in the kernel, so that they are never copied to memory of
// ours: of a large write that is one of two copies. Each part is written when
// no more is there, while the client sends the next; a part ends at a page of the
// disk, or what is written back between two of them would have torn sectors.
type pipeState struct {
	*pipe
	never bool // there is no pipe for this connection
	rest  int  // payloads that do not go through it
}

func (s *pipeState) close() {
	if s.pipe != nil {
		s.pipe.close()
		s.pipe = nil
	}
}

// mayPipe says whether the payload of a WRITE, of n bytes, goes through the pipe.
// The leader writes it then, so that is not for a backend that is slow, nor for a
// request that is to have a worker.
func (c *conn) mayPipe(n int) bool {
	s := c.store.splicer
	if s == nil || n < pipePayload || n >= bigRequest || c.pipe.never || c.pace.workers || !s.CanSplice() {
		return false
	}
	if c.pipe.rest > 0 {
		c.pipe.rest--
		return false
	}
	if c.pipe.pipe == nil {
		c.pipe.pipe = newPipe(c.nc)
		c.pipe.never = c.pipe.pipe == nil
	}
	return !c.pipe.never
}

// pipeWrite writes the payload of a WRITE while it is received. left is its length.
func (r *request) pipeWrite(left int) error {
	p, in := &r.c.pipe, r.c.in
	in.ahead = smallAhead
	held := min(left, in.buffered()) // in the pipe
	if err := p.put(in.buf[in.r : in.r+held]); err != nil {
		return err
	}
	in.r += held
	left -= held
	for {
		n := 0
		if left > 0 {
			var err error
			if n, err = p.take(left, false); err != nil {
				return err
			}
			held += n
			left -= n
			if n > 0 && left > 0 {
				continue
			}
		}
		whole := held
		if left > 0 {
			whole = r.wholePages(held)
		}
		if err := r.spliceOut(whole); err != nil {
			return err
		}
		if r.err != ok {
			p.close() // with what is left in it
			return in.skip(int64(left))
		}
		if held -= whole; left == 0 {
			return nil
		}
		if whole > 0 {
			continue
		}
		// Of bytes that came one by one a pipe does not take many.
		if err := p.pack(held); err != nil {
			return err
		}
		n, err := p.take(left, true)
		if err != nil {
			return err
		}
		held += n
		left -= n
	}
}

// wholePages is how much of the next n bytes to be written ends at a page.
func (r *request) wholePages(n int) int {
	return max(0, n-int((r.off+r.written+uint64(n))%pipePage))
}

// spliceOut writes the next n bytes, which are in the pipe.
func (r *request) spliceOut(n int) error {
	if n == 0 {
		return nil
	}
	if r.c.dead.Load() { // a write of a client that has gone must not go on
		return errHungUp
	}
	began := time.Now()
	r.fail(r.c.store.splicer.SpliceAt(r.c.pipe.r, int64(r.off+r.written), int64(n)))
	if time.Since(began) > pipeStuck {
		r.c.pipe.rest = pipeRest
	}
	r.written += uint64(n)
	return nil
}
