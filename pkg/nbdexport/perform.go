package nbdexport

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
)

// run performs a request and queues its reply. The request is not the caller's
// any more then.
func (c *conn) run(r *request) {
	if c.dead.Load() { // a write of a client that has gone must not begin
		r.free()
		return
	}
	if r.err == ok {
		r.perform()
	}
	r.encode()
	c.enqueue(r)
}

// perform does what was asked and notes an error.
func (r *request) perform() {
	s := r.c.store
	switch r.typ {
	case cmdRead:
		r.read()
	case cmdWrite:
		r.writeSegments()
	case cmdFlush:
		r.fail(s.flush(&r.wait))
	case cmdTrim:
		if r.length > 0 {
			r.fail(s.trim.TrimAtContext(&r.wait, int64(r.off), int64(r.length)))
		}
	case cmdCache:
		if r.length > 0 {
			r.fail(s.prefetch.Prefetch(int64(r.off), int64(r.length)))
		}
	case cmdWriteZeroes:
		r.writeZeroes()
	case cmdBlockStatus:
		r.blockStatus()
	}
	writes := r.typ == cmdWrite || r.typ == cmdTrim || r.typ == cmdWriteZeroes
	if r.err == ok && writes && r.flags&cmdFlagFUA != 0 {
		r.fail(s.flush(&r.wait))
	}
}

// fail notes an error of the backend. When the wait was ended by us, the
// reason for that is what the client is told.
func (r *request) fail(err error) {
	if err == nil {
		return
	}
	r.c.mu.Lock()
	r.err = r.wait.ended
	r.c.mu.Unlock()
	if r.err == ok {
		r.err = errnoOf(err)
		r.c.s.log.Warn("request failed", "export", r.c.e.Name, "command", commandName(r.typ),
			"off", r.off, "length", r.length, "errno", uint32(r.err), "err", err)
	}
}

// read reads the data of a READ into its segment.
func (r *request) read() {
	if r.length == 0 {
		return
	}
	p := r.segments[0].buf.b[:r.length]
	r.readPart(p, int64(r.off))
	if r.err == ok && r.c.mode >= modeStructured && r.flags&cmdFlagDF == 0 {
		r.findHoles(p)
	}
}

func (r *request) readPart(p []byte, off int64) {
	n, err := r.c.store.readAt(&r.wait, p, off)
	switch {
	case n == len(p): // with io.EOF, too, all is there
	case err != nil:
		r.fail(err)
	default:
		r.fail(io.ErrUnexpectedEOF)
	}
}

// writeSegments writes the data of a WRITE that is here.
func (r *request) writeSegments() {
	for _, g := range r.segments {
		if r.err != ok {
			return
		}
		if r.c.dead.Load() {
			r.err = errNotServed
			return
		}
		n, err := r.c.store.writeAt(&r.wait, g.buf.b[:g.n], int64(r.off+r.written))
		if err == nil && n != g.n {
			err = io.ErrShortWrite
		}
		r.fail(err)
		r.written += uint64(g.n)
	}
}

func (r *request) writeZeroes() {
	if r.length == 0 {
		return
	}
	s, punch := r.c.store, r.flags&cmdFlagNoHole == 0
	if r.flags&cmdFlagFastZero == 0 {
		r.fail(s.zero.ZeroAtContext(&r.wait, int64(r.off), int64(r.length), punch))
		return
	}
	err := s.fastZero.FastZeroAtContext(&r.wait, int64(r.off), int64(r.length), punch)
	if isUnsupported(err) {
		r.err = errNotSup
		return
	}
	r.fail(err)
}

// findHoles finds what of the data read is zero and need not be sent. Only
// whole, aligned blocks count, and a block that does not begin with zeroes
// costs one look. It leaves no extents when all is data, or too scattered to
// be worth it.
func (r *request) findHoles(p []byte) {
	edge := int(-r.off & (holeSize - 1)) // to the first aligned block
	if edge+holeSize > len(p) {
		return
	}
	r.room, r.one = r.length, false
	zero := false
	if edge > 0 {
		r.gather(int64(edge), 0)
	}
	for at := edge; at < len(p); at += holeSize {
		b := p[at:min(at+holeSize, len(p))]
		if len(b) < holeSize || !isZero(b) {
			r.gather(int64(len(b)), 0)
			continue
		}
		zero = true
		r.gather(holeSize, stateZero)
		if len(r.extents) > maxReadChunks {
			break
		}
	}
	if !zero || len(r.extents) > maxReadChunks {
		r.extents = r.extents[:0]
	}
}

var zeroes [holeSize]byte

func isZero(b []byte) bool {
	return binary.NativeEndian.Uint64(b) == 0 && bytes.Equal(b, zeroes[:])
}

// gather adds an extent; it is what BlockStatus yields to.
func (r *request) gather(length int64, flags uint32) bool {
	n := min(uint64(max(length, 0)), r.room)
	if n == 0 {
		return r.room > 0
	}
	r.room -= n
	if i := len(r.extents) - 1; i >= 0 && r.extents[i].flags == flags &&
		(r.c.mode == modeExtended || r.extents[i].length+n <= math.MaxUint32) {
		r.extents[i].length += n
	} else {
		if r.one && i >= 0 || len(r.extents) == maxExtents {
			r.room = 0
			return false
		}
		r.extents = append(r.extents, extent{n, flags})
	}
	return r.room > 0
}

func commandName(typ uint16) string {
	names := [...]string{"READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS"}
	if int(typ) < len(names) {
		return names[typ]
	}
	return "unknown"
}
