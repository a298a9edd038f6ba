package nbdexport

import "encoding/binary"

// encode puts the reply of a request that has ended into out.
func (r *request) encode() {
	r.out = r.out[:0]
	switch {
	case r.err != ok:
		r.encodeError()
	case r.typ == cmdRead && r.length > 0:
		r.encodeData()
	case r.typ == cmdBlockStatus:
		r.out = append(r.out, r.chunks)
	case r.c.mode == modeExtended, r.typ == cmdRead && r.c.mode == modeStructured:
		r.out = append(r.out, r.appendChunk(r.head[:0], replyFlagDone, replyNone, 0))
	default:
		r.out = append(r.out, r.appendSimple(r.head[:0]))
	}
	r.size = 0
	for _, b := range r.out {
		r.size += int64(len(b))
	}
}

func (r *request) encodeError() {
	simple := r.c.mode == modeSimple ||
		r.c.mode == modeStructured && r.typ != cmdRead && r.typ != cmdBlockStatus
	if simple {
		r.out = append(r.out, r.appendSimple(r.head[:0]))
		return
	}
	b := r.appendChunk(r.head[:0], replyFlagDone, replyError, 6)
	b = binary.BigEndian.AppendUint32(b, uint32(r.err))
	b = binary.BigEndian.AppendUint16(b, 0) // no message
	r.out = append(r.out, b)
}

// encodeData encodes what a READ has read.
func (r *request) encodeData() {
	p := r.segments[0].buf.b[:r.length]
	switch {
	case r.c.mode == modeSimple:
		r.out = append(r.out, r.appendSimple(r.head[:0]), p)
		return
	case len(r.extents) == 0:
		b := r.appendChunk(r.head[:0], replyFlagDone, replyOffsetData, 8+r.length)
		r.out = append(r.out, binary.BigEndian.AppendUint64(b, r.off), p)
		return
	}
	// All heads first: they must not move when the next one is appended.
	const most = extendedReplyLen + 12
	if cap(r.chunks) < most*len(r.extents) {
		r.chunks = make([]byte, 0, most*len(r.extents))
	}
	b, at := r.chunks[:0], uint64(0)
	for i, e := range r.extents {
		flags := uint16(0)
		if i == len(r.extents)-1 {
			flags = replyFlagDone
		}
		begin := len(b)
		if e.flags&stateZero != 0 {
			b = r.appendChunk(b, flags, replyOffsetHole, 12)
			b = binary.BigEndian.AppendUint64(b, r.off+at)
			b = binary.BigEndian.AppendUint32(b, uint32(e.length))
			r.out = append(r.out, b[begin:])
		} else {
			b = r.appendChunk(b, flags, replyOffsetData, 8+e.length)
			b = binary.BigEndian.AppendUint64(b, r.off+at)
			r.out = append(r.out, b[begin:], p[at:at+e.length])
		}
		at += e.length
	}
}

// appendSimple appends a simple reply without data.
func (r *request) appendSimple(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, uint32(r.err))
	return binary.BigEndian.AppendUint64(b, r.cookie)
}

// appendChunk appends the head of a structured reply chunk, or of an extended
// one where these were negotiated.
func (r *request) appendChunk(b []byte, flags, typ uint16, length uint64) []byte {
	if r.c.mode == modeExtended {
		b = binary.BigEndian.AppendUint32(b, magicExtendedReply)
		b = binary.BigEndian.AppendUint16(b, flags)
		b = binary.BigEndian.AppendUint16(b, typ)
		b = binary.BigEndian.AppendUint64(b, r.cookie)
		b = binary.BigEndian.AppendUint64(b, r.off)
		return binary.BigEndian.AppendUint64(b, length)
	}
	b = binary.BigEndian.AppendUint32(b, magicStructuredReply)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}
