package protocol

import (
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// Completion is told how a request ended.
type Completion interface {
	// Complete is called exactly once, on the goroutine that reads or ends the
	// connection, and must not block. It may come before the call that started
	// the request returns.
	Complete(err error)
}

// call is a request of ours that waits for its answer.
type call struct {
	done    Completion // nil: a free slot
	dev, id uint32
	command wire.Command
	off     int64
	length  int64
	window  int64       // bytes that it takes of to's window
	to      *ToProtocol // nil: no device has to be told
}

// finish tells whoever waits. The caller has taken the call out of calls, so
// this happens once.
func (c *call) finish(err error) {
	if c.window > 0 {
		c.to.window.release(c.window)
	}
	c.done.Complete(err)
}

// calls holds the requests that wait for an answer: a ring by transaction id,
// which costs no allocation for a request. An id whose slot is still taken is
// passed over.
type calls struct {
	mu sync.Mutex
	// Guarded by mu:
	slots []call // a power of two, at most half full
	used  int
	last  uint32 // the id given out last
	err   error  // not nil: the connection has ended
}

// id gives out the next transaction id, for a request that has no answer.
func (cs *calls) id() uint32 {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.nextLocked()
}

func (cs *calls) nextLocked() uint32 {
	cs.last++
	if cs.last == 0 { // 0 means "any" to Silo
		cs.last = 1
	}
	return cs.last
}

// add registers c and gives it its id. It comes before sending: the answer can
// beat the send's return.
func (cs *calls) add(c call) (uint32, error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.err != nil {
		return 0, cs.err
	}
	if 2*(cs.used+1) > len(cs.slots) {
		cs.growLocked()
	}
	for {
		c.id = cs.nextLocked()
		if s := cs.slotLocked(c.id); s.done == nil {
			*s = c
			cs.used++
			return c.id, nil
		}
	}
}

func (cs *calls) slotLocked(id uint32) *call {
	return &cs.slots[id&uint32(len(cs.slots)-1)]
}

func (cs *calls) growLocked() {
	old := cs.slots
	cs.slots = make([]call, max(64, 2*len(old)))
	for _, c := range old {
		if c.done != nil {
			*cs.slotLocked(c.id) = c // ids that differed by less than the old size still do
		}
	}
}

// take takes out the request that a response belongs to. Whoever gets it calls
// finish.
func (cs *calls) take(dev, id uint32) (call, bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(cs.slots) == 0 {
		return call{}, false
	}
	s := cs.slotLocked(id)
	if s.done == nil || s.id != id || s.dev != dev {
		return call{}, false
	}
	c := *s
	*s = call{}
	cs.used--
	return c, true
}

func (cs *calls) len() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.used
}

// end takes out everything, and refuses what comes later with err.
func (cs *calls) end(err error) []call {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.err = err
	var open []call
	for _, c := range cs.slots {
		if c.done != nil {
			open = append(open, c)
		}
	}
	cs.slots, cs.used = nil, 0
	return open
}
