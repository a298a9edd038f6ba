package nbdexport

import (
	"encoding/binary"
	"slices"
)

// receiveFilter reads the payload of NBD_CMD_BLOCK_STATUS: the real length,
// and the ids of the contexts that the client cares for.
func (r *request) receiveFilter(payload int64) error {
	if payload < 8 || payload%4 != 0 || payload > int64(8+4*len(r.c.contexts)) {
		r.err = errInval
		return r.skip(payload)
	}
	b, err := r.c.in.next(int(payload))
	if err != nil {
		return noEOF(err)
	}
	r.length = binary.BigEndian.Uint64(b)
	r.filter = []uint32{}
	for b = b[8:]; len(b) > 0; b = b[4:] {
		id := binary.BigEndian.Uint32(b)
		if id == 0 || id > uint32(len(r.c.contexts)) || slices.Contains(r.filter, id) {
			r.err = errInval
		}
		r.filter = append(r.filter, id)
	}
	switch {
	case r.err != ok:
	case r.length == 0 || len(r.filter) == 0:
		r.err = errInval
	default:
		r.err = r.checkRange(false)
	}
	return nil
}

// blockStatus answers NBD_CMD_BLOCK_STATUS: it puts the whole reply into
// chunks, one chunk a context.
func (r *request) blockStatus() {
	last := 0
	for i := range r.c.contexts {
		if r.filter == nil || slices.Contains(r.filter, contextID(i)) {
			last = i
		}
	}
	length := r.length
	r.one = r.flags&cmdFlagReqOne != 0
	for i, name := range r.c.contexts {
		if r.filter != nil && !slices.Contains(r.filter, contextID(i)) {
			continue
		}
		r.extents, r.room = r.extents[:0], length
		err := r.c.store.status.BlockStatus(&r.wait, name, int64(r.off), int64(length), r.addExtent)
		if err != nil {
			r.fail(err)
			return
		}
		if len(r.extents) == 0 { // a reply has to have one
			r.err = errIO
			return
		}
		r.appendStatus(contextID(i), i == last)
	}
}

// appendStatus adds the chunk of one context.
func (r *request) appendStatus(id uint32, last bool) {
	flags := uint16(0)
	if last {
		flags = replyFlagDone
	}
	if r.c.mode == modeExtended {
		b := r.appendChunk(r.chunks, flags, replyBlockStatusExt, uint64(8+16*len(r.extents)))
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint32(b, uint32(len(r.extents)))
		for _, e := range r.extents {
			b = binary.BigEndian.AppendUint64(b, e.length)
			b = binary.BigEndian.AppendUint64(b, uint64(e.flags))
		}
		r.chunks = b
		return
	}
	b := r.appendChunk(r.chunks, flags, replyBlockStatus, uint64(4+8*len(r.extents)))
	b = binary.BigEndian.AppendUint32(b, id)
	for _, e := range r.extents {
		b = binary.BigEndian.AppendUint32(b, uint32(e.length))
		b = binary.BigEndian.AppendUint32(b, e.flags)
	}
	r.chunks = b
}
