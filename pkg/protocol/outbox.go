package protocol

import (
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// outbox gathers small urgent packets (answers, NeedAt, DontNeedAt) while the
// socket is busy and writes all of them at once, in order. Whoever finds nobody
// writing writes, for the others too.
type outbox struct {
	p *ProtocolRW

	mu      sync.Mutex
	changed sync.Cond
	// Guarded by mu:
	buf     []byte // not yet written
	spare   []byte // the other buffer, while nobody writes from it
	writing bool
	closed  bool
	added   uint64 // bytes ever
	written uint64 // bytes ever
}

func (o *outbox) init(p *ProtocolRW) {
	o.p = p
	o.changed.L = &o.mu
}

func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	o.changed.Broadcast()
}

// send takes a whole packet. With wait it returns when the packet is handed to
// the socket, otherwise as soon as there is room.
func (o *outbox) send(dev, id uint32, packet []byte, wait bool) error {
	o.mu.Lock()
	for len(o.buf) >= maxOutbox && !o.closed {
		o.changed.Wait()
	}
	if o.closed {
		o.mu.Unlock()
		<-o.p.done
		return o.p.err
	}
	h := wire.Header{Dev: dev, ID: id, Length: uint32(len(packet))}
	o.buf = append(h.Append(o.buf), packet...)
	o.added += uint64(wire.HeaderSize + len(packet))
	mine := o.added
	if !o.writing {
		o.writeLocked()
	}
	for wait && o.written < mine && !o.closed {
		o.changed.Wait()
	}
	lost := wait && o.written < mine
	o.mu.Unlock()
	if lost {
		<-o.p.done
		return o.p.err
	}
	return nil
}

// writeLocked writes until nothing is left. It lets go of mu meanwhile.
func (o *outbox) writeLocked() {
	o.writing = true
	for len(o.buf) > 0 && !o.closed {
		b := o.buf
		o.buf, o.spare = o.spare[:0], nil
		o.mu.Unlock()
		ok := o.write(b)
		o.mu.Lock()
		o.spare = b
		if ok {
			o.written += uint64(len(b))
		}
		o.changed.Broadcast()
	}
	o.writing = false
}

func (o *outbox) write(b []byte) bool {
	if !o.p.sender.acquire(PriorityUrgent) {
		return false
	}
	if o.p.sender.checking {
		b = o.p.sender.wrap(b)
	}
	var err error
	if !o.p.sender.deaf.Load() {
		_, err = o.p.sender.w.Write(b)
	}
	o.p.sender.release()
	if err != nil {
		err = o.p.writeFailed(err) // ends the connection, which tells everybody
	}
	return err == nil
}
