package nbdexport

import "time"

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

// pipeWrite writes the payload of a WRITE while it is received. left is its length,
// of which firstSegment is charged.
func (r *request) pipeWrite(left int) error {
	p, in := &r.c.pipe, r.c.in
	in.ahead = smallAhead
	held := min(left, in.buffered()) // in the pipe
	if err := p.put(in.buf[in.r : in.r+held]); err != nil {
		return err
	}
	in.r += held
	left -= held
	wait, spent := false, time.Duration(0)
	for left > 0 {
		n, err := p.take(min(left, r.pipeRoom(held)), wait)
		if isUnsupported(err) && held <= len(in.buf) {
			p.never = true
			return r.unpipe(held, left)
		}
		if err != nil {
			return err
		}
		held += n
		left -= n
		if wait = false; n > 0 && left > 0 && r.pipeRoom(held) > 0 {
			continue
		}
		whole := held
		if left > 0 {
			whole = r.wholePages(held)
		}
		took, err := r.spliceOut(whole)
		if err != nil {
			return err
		}
		if r.err != ok {
			p.close() // with what is left in it
			r.dropData()
			return in.skip(int64(left))
		}
		held -= whole
		if spent += took; spent > r.c.s.o.pipeStuck {
			p.rest = pipeRest
			return r.unpipe(held, left)
		}
		if whole > 0 || left == 0 {
			continue
		}
		// Of bytes that came one by one a pipe does not take many.
		if err := p.pack(held); err != nil {
			return err
		}
		r.keep(firstSegment) // who sends no more must not hold more
		wait = true
	}
	r.dropData() // of a pipe that is empty: the reply may wait for the client
	return nil
}

// pipeRoom is how much more may be in the pipe, which has held bytes. What is charged
// follows the bytes; where there is no more of it, parts are smaller.
func (r *request) pipeRoom(held int) int {
	if int64(held) == r.charged && held < pipeSize {
		r.tryCharge(firstSegment)
	}
	return int(r.charged) - held
}

// unpipe has the rest of a payload received the ordinary way: held bytes that are in
// the pipe, and left that are not.
func (r *request) unpipe(held, left int) error {
	in := r.c.in
	in.r, in.w = 0, held // all that was read ahead is in the pipe
	if err := r.c.pipe.get(in.buf[:held]); err != nil {
		return err
	}
	r.dropData() // of the pipe, which is empty
	return r.receiveSegments(held + left)
}

// wholePages is how much of the next n bytes to be written ends at a page.
func (r *request) wholePages(n int) int {
	return max(0, n-int((r.off+r.written+uint64(n))%pipePage))
}

// spliceOut writes the next n bytes, which are in the pipe, and says how long that took.
func (r *request) spliceOut(n int) (time.Duration, error) {
	if n == 0 {
		return 0, nil
	}
	if r.c.dead.Load() { // a write of a client that has gone must not go on
		return 0, errHungUp
	}
	began := time.Now()
	r.fail(r.c.store.splicer.SpliceAt(r.c.pipe.r, int64(r.off+r.written), int64(n)))
	r.written += uint64(n)
	return time.Since(began), nil
}
