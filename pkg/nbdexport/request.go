package nbdexport

import (
	"encoding/binary"
	"fmt"
	"math"
)

// request is a request from its header to its reply. It belongs to the worker
// that runs it, then to the one that writes its reply; only wait is shared.
type request struct {
	c    *conn
	word uint64 // of the leader that runs it; 0 when a worker does that does not lead

	flags  uint16
	typ    uint16
	cookie uint64
	off    uint64
	length uint64 // of what it is about; in NBD_CMD_BLOCK_STATUS with a payload, of that until it is received

	err errno // refused, or failed

	segments  []segment // of a WRITE, or the one of a READ
	written   uint64    // bytes of a WRITE that are written already, and no segment any more
	charged   int64     // bytes held of a budget
	from      *budget   // of which; nil for the allowance
	extents   []extent  // of a READ with holes, or of NBD_CMD_BLOCK_STATUS
	addExtent func(length int64, flags uint32) bool
	room      uint64   // bytes that extents may still cover
	filter    []uint32 // context ids that NBD_CMD_BLOCK_STATUS is limited to; nil for all
	one       bool     // one extent is enough
	wait      waiter
	spent     bool // the wait's timer may still come: the request is not used again

	head   [64]byte // of the reply
	chunks []byte   // further heads
	out    [][]byte // the whole reply
	size   int64    // bytes of it
}

// segment is a part of a request's data.
type segment struct {
	buf *buffer
	n   int
}

// extent is a run with the same flags.
type extent struct {
	length uint64
	flags  uint32
}

func newRequest(c *conn) *request {
	r, is := c.s.requests.Get().(*request)
	if !is {
		r = new(request)
		r.wait.r = r
		r.addExtent = r.gather
	}
	r.c = c
	return r
}

// free gives back all that the request holds.
func (r *request) free() {
	r.dropData()
	clear(r.out)
	r.out = r.out[:0]
	if cap(r.chunks) > 1<<10 {
		r.chunks = nil
	}
	if cap(r.extents) > 64 {
		r.extents = nil
	}
	r.chunks, r.extents = r.chunks[:0], r.extents[:0]
	if r.spent {
		return
	}
	pool := &r.c.s.requests
	r.word, r.err, r.written, r.filter, r.one, r.c = 0, ok, 0, nil, false, nil
	pool.Put(r)
}

// dropData frees the segments and what was charged for them.
func (r *request) dropData() {
	for _, s := range r.segments {
		s.buf.free()
	}
	clear(r.segments)
	r.segments = r.segments[:0]
	if r.charged > 0 {
		if r.from != nil {
			r.from.release(r.charged)
		} else {
			r.c.allowance.Store(false)
		}
		r.charged, r.from = 0, nil
	}
}

// parse reads a header. An error means that the stream is out of step.
func (r *request) parse(b []byte) error {
	magic, want := binary.BigEndian.Uint32(b), magicRequest
	if r.c.mode == modeExtended {
		want = magicExtendedRequest
	}
	if magic != want {
		return fmt.Errorf("request magic %#x, want %#x", magic, want)
	}
	r.flags = binary.BigEndian.Uint16(b[4:])
	r.typ = binary.BigEndian.Uint16(b[6:])
	r.cookie = binary.BigEndian.Uint64(b[8:])
	r.off = binary.BigEndian.Uint64(b[16:])
	if r.c.mode == modeExtended {
		r.length = binary.BigEndian.Uint64(b[24:])
	} else {
		r.length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	return nil
}

// payloadLen is how many bytes follow the header. A WRITE always has a
// payload: there are clients that leave its flag out with extended headers.
func (r *request) payloadLen() int64 {
	if r.typ == cmdWrite || r.c.mode == modeExtended && r.flags&cmdFlagPayloadLen != 0 {
		return int64(min(r.length, math.MaxInt64))
	}
	return 0
}

// check says whether the request is one that is served.
func (r *request) check() errno {
	s := r.c.store
	allowed := cmdFlagFUA
	writes, empty := false, false
	switch r.typ {
	case cmdRead:
		if r.c.mode >= modeStructured {
			allowed |= cmdFlagDF
		}
	case cmdWrite:
		writes = true
		if r.c.mode == modeExtended {
			allowed |= cmdFlagPayloadLen
		}
	case cmdFlush:
		empty = true
	case cmdTrim:
		if s.trim == nil {
			return errInval
		}
		writes = true
	case cmdCache:
		if s.prefetch == nil {
			return errInval
		}
	case cmdWriteZeroes:
		if s.zero == nil {
			return errInval
		}
		writes = true
		allowed |= cmdFlagNoHole
		if s.fastZero != nil {
			allowed |= cmdFlagFastZero
		}
	case cmdBlockStatus:
		if len(r.c.contexts) == 0 {
			return errInval
		}
		allowed |= cmdFlagReqOne
		if r.c.mode == modeExtended {
			allowed |= cmdFlagPayloadLen
		}
		if r.flags&cmdFlagPayloadLen != 0 {
			empty = true // receivePayload reads the length, and checks it
		} else if r.length == 0 {
			return errInval
		}
	default:
		return errInval
	}
	switch {
	case r.flags&^allowed != 0:
		return errInval
	case writes && r.c.e.ReadOnly:
		return errPerm
	case (r.typ == cmdRead || r.typ == cmdWrite) && r.length > maxPayload:
		return errInval
	case empty:
		return ok
	}
	return r.checkRange(writes)
}

// checkRange says whether the range lies inside the export.
func (r *request) checkRange(writes bool) errno {
	size := uint64(r.c.store.size)
	if r.off <= size && r.length <= size-r.off {
		return ok
	}
	if writes && r.typ != cmdTrim {
		return errNoSpace
	}
	return errInval
}

// receive takes what belongs to the request off the stream and gets it the
// memory that it needs. An error means that the stream has ended or is out of
// step; a request that is refused is none.
func (r *request) receive() error {
	r.err = r.check()
	if r.err == ok && r.c.stopped() {
		r.err = errShutdown
	}
	payload := r.payloadLen()
	if r.err != ok {
		return r.skip(payload)
	}
	switch {
	case r.typ == cmdWrite:
		return r.receiveWrite(int(payload))
	case payload > 0 || r.flags&cmdFlagPayloadLen != 0:
		return r.receiveFilter(payload)
	case r.typ == cmdRead && r.length > 0:
		n := int(r.length)
		if err := r.charge(int64(bufferSize(n))); err != nil {
			return err
		}
		r.segments = append(r.segments, segment{newBuffer(n), n})
	}
	return nil
}

func (r *request) skip(n int64) error {
	if n > maxSkip {
		return fmt.Errorf("payload of %d bytes: more than is skipped", n)
	}
	return r.c.in.skip(n)
}

// receiveWrite reads the payload of a WRITE. Memory follows the bytes: each
// segment is about as large as all that came before.
func (r *request) receiveWrite(left int) error {
	if r.c.mayPipe(left) && r.tryCharge(firstSegment) {
		return r.pipeWrite(left)
	}
	return r.receiveSegments(left)
}

// receiveSegments is receiveWrite into memory, of what comes next.
func (r *request) receiveSegments(left int) error {
	in, small := r.c.in, left < smallPayload
	in.ahead = len(in.buf)
	if !small {
		in.ahead = smallAhead
	}
	for got := 0; left > 0; {
		n := min(left, max(firstSegment, min(got, lastSegment)))
		size := int64(bufferSize(n))
		if !r.tryCharge(size) {
			// Memory is short, so write what is here before asking for more: a
			// request that waits for memory must hold none.
			if r.spill(); r.err != ok {
				return in.skip(int64(left))
			}
			if err := r.charge(size); err != nil {
				return err
			}
		}
		b := newBuffer(n)
		r.segments = append(r.segments, segment{b, n})
		if err := in.read(b.b[:n], small); err != nil {
			return err
		}
		got += n
		left -= n
	}
	return nil
}

// spill writes the segments that are here.
func (r *request) spill() {
	r.writeSegments()
	r.c.mu.Lock()
	r.wait.endLocked()
	r.c.mu.Unlock()
	r.dropData()
}

// tryCharge takes n bytes of the budget if they are free; a connection that
// has nothing else under way may have a little beyond it.
func (r *request) tryCharge(n int64) bool {
	s := r.c.s
	if r.charged == 0 || r.from == &s.budget {
		if s.budget.try(n) {
			r.charged += n
			r.from = &s.budget
			return true
		}
	}
	if r.charged == 0 && n <= freeRequest && r.c.allowance.CompareAndSwap(false, true) {
		r.charged = n
		return true
	}
	return false
}

// keep gives back what is charged beyond n bytes.
func (r *request) keep(n int64) {
	if r.from != nil && r.charged > n {
		r.from.release(r.charged - n)
		r.charged = n
	}
}

// charge takes n bytes of the budget and waits for them.
func (r *request) charge(n int64) error {
	if r.tryCharge(n) {
		return nil
	}
	r.c.flush() // the replies not sent yet hold memory too
	if !r.c.s.budget.acquire(n, r.c.dying) {
		return errHungUp
	}
	r.charged += n
	r.from = &r.c.s.budget
	return nil
}
