package protocol

import (
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// Priority says which packets go first whenever the socket is free.
type Priority int

const (
	// PriorityBulk is for data that nobody waits for yet.
	PriorityBulk Priority = iota
	// PriorityUrgent is for data that was asked for; control packets and answers
	// have it too. Of every maxUrgentRun and one packets one is bulk, if one waits.
	PriorityUrgent
)

// sender is the right to write to the connection. It is handed to urgent
// packets first, but not for ever: somebody may have asked for a block that is
// on its way as bulk data. It is no mutex, since it is held over the write.
type sender struct {
	w       io.Writer
	vectors buffersWriter // w, if it is one
	wanted  atomic.Bool   // the peer takes checked packets
	deaf    atomic.Bool   // nobody listens: what would be written is let go

	mu     sync.Mutex
	urgent sync.Cond
	turns  sync.Pool // of *bulkTurn
	// Guarded by mu:
	busy      bool
	waiting   int         // urgent ones
	bulk      []*bulkTurn // bulk ones, in the order in which they came
	overtaken int         // urgent ones in a row that went before a bulk one that waited
	closed    bool

	// Used by the holder alone:
	checking bool // what is written now is checked
	head     []byte
	batch    []byte
	vec      [2][]byte
	bufs     net.Buffers
}

// bulkTurn is a bulk packet that waits. The right is handed to it, and cannot be taken
// by another one in between: else a device that always has a packet would keep it from
// the others.
type bulkTurn struct{ ready chan struct{} } // capacity 1

// buffersWriter is a connection with its own way to write many slices in one
// system call.
type buffersWriter interface {
	// WriteBuffers writes v, with the contract of net.Buffers.WriteTo.
	WriteBuffers(v *net.Buffers) (int64, error)
}

func (s *sender) init(w io.Writer) {
	s.w = w
	s.vectors, _ = w.(buffersWriter)
	s.urgent.L = &s.mu
	s.turns.New = func() any { return &bulkTurn{make(chan struct{}, 1)} }
	s.head = make([]byte, 0, maxCoalesced+maxSmall)
}

// acquire waits for the right to write; false says that the connection ended.
func (s *sender) acquire(pri Priority) bool {
	if pri == PriorityBulk {
		return s.acquireBulk()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting++
	for (s.busy || s.bulkTurnLocked()) && !s.closed {
		s.urgent.Wait()
	}
	s.waiting--
	if len(s.bulk) > 0 {
		s.overtaken++
	}
	return s.takeLocked()
}

func (s *sender) acquireBulk() bool {
	s.mu.Lock()
	if s.busy || s.waiting > 0 || len(s.bulk) > 0 {
		t := s.turns.Get().(*bulkTurn)
		s.bulk = append(s.bulk, t)
		if s.closed {
			s.releaseBulkLocked()
		}
		s.mu.Unlock()
		<-t.ready
		s.turns.Put(t)
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	s.overtaken = 0
	return s.takeLocked()
}

func (s *sender) takeLocked() bool {
	if s.closed {
		return false
	}
	s.busy = true
	s.checking = s.wanted.Load()
	return true
}

// bulkTurnLocked reports whether a bulk packet has been overtaken often enough.
func (s *sender) bulkTurnLocked() bool {
	return len(s.bulk) > 0 && s.overtaken >= maxUrgentRun
}

func (s *sender) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.bulk) > 0 && (s.waiting == 0 || s.bulkTurnLocked()) {
		s.bulk[0].ready <- struct{}{} // it is busy for that one
		s.bulk = append(s.bulk[:0], s.bulk[1:]...)
		return
	}
	s.busy = false
	s.urgent.Signal()
}

// close wakes all that wait.
func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.urgent.Broadcast()
	s.releaseBulkLocked()
}

func (s *sender) releaseBulkLocked() {
	for _, t := range s.bulk {
		t.ready <- struct{}{}
	}
	s.bulk = nil
}

// writePacket writes one packet: its first bytes, which are few, and a payload
// that is not copied unless it is small. sum is for a checked one.
// The right to write is held.
func (s *sender) writePacket(h wire.Header, first, payload []byte, sum uint32) error {
	if s.checking {
		s.head = wire.AppendCheckedHead(s.head[:0], h, wire.Command(first[0]), sum)
	} else {
		s.head = h.Append(s.head[:0])
	}
	s.head = append(s.head, first...)
	if len(payload) <= maxCoalesced {
		s.head = append(s.head, payload...)
		_, err := s.w.Write(s.head)
		return err
	}
	s.vec = [2][]byte{s.head, payload}
	s.bufs = s.vec[:]
	var err error
	if s.vectors != nil {
		_, err = s.vectors.WriteBuffers(&s.bufs)
	} else {
		_, err = s.bufs.WriteTo(s.w) // writev, where w is a socket
	}
	s.vec = [2][]byte{}
	return err
}

// send writes one packet, of which first is few bytes, when its turn has come. An error ends the connection,
// since nobody knows how much of the packet is out.
func (p *ProtocolRW) send(pri Priority, dev, id uint32, first, payload []byte) error {
	return p.sendMarked(pri, dev, id, first, payload, nil)
}

// sendMarked sets mark, if there is one, when the packet's turn has come: what
// sees it set and is sent goes out later.
func (p *ProtocolRW) sendMarked(pri Priority, dev, id uint32, first, payload []byte, mark *atomic.Bool) error {
	h := wire.Header{Dev: dev, ID: id, Length: uint32(len(first) + len(payload))}
	var sum uint32
	summed := p.sender.wanted.Load()
	if summed { // now, since others can have the socket meanwhile
		sum = wire.SumChecked(first, payload)
	}
	if !p.sender.acquire(pri) {
		<-p.done
		return p.err
	}
	if mark != nil {
		mark.Store(true)
	}
	if p.sender.checking && !summed {
		sum = wire.SumChecked(first, payload)
	}
	var err error
	if !p.sender.deaf.Load() {
		err = p.sender.writePacket(h, first, payload, sum)
	}
	p.sender.release()
	if err != nil {
		return p.writeFailed(err)
	}
	return nil
}
