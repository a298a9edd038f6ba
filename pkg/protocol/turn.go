package protocol

import (
	"errors"
	"sync"
	"time"
)

// turn says which goroutine reads the connection. The one that has read a
// packet of data takes it to the store itself, since the data is in its
// processor's cache and a second goroutine would have to be woken; if the store
// is not done within maxAside, another one begins to read. So a slow store
// stops nobody, and a quick one costs no hand-over. The idea is that of the
// leader/followers pattern (Schmidt and others, 2000), with the promotion put
// off until it is needed.
type turn struct {
	timer *time.Timer // fires maxAside after lend; made by Handle

	mu   sync.Mutex
	lent bool // the reader is at a store
	// ended has capacity 1: why reading ended, told by whoever read last.
	ended chan error
}

// errTurnLost says to a reader that another one reads now.
var errTurnLost = errors.New("another goroutine reads")

// lend notes that the reader goes to a store.
func (t *turn) lend() {
	t.mu.Lock()
	t.lent = true
	t.mu.Unlock()
	t.timer.Reset(maxAside)
}

// takeBack notes that it is back; false says that another one reads now.
func (t *turn) takeBack() bool {
	t.timer.Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := t.lent
	t.lent = false
	return mine
}

// takeOver says whether there is nobody who reads.
func (t *turn) takeOver() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	free := t.lent
	t.lent = false
	return free
}

// readLoop reads until the connection ends, or until another goroutine does.
func (p *ProtocolRW) readLoop() {
	if err := p.readPackets(); err != errTurnLost {
		p.turn.ended <- err
	}
}

// relieve begins to read in place of a goroutine that stays away.
func (p *ProtocolRW) relieve() {
	if p.turn.takeOver() {
		p.start(p.readLoop)
	}
}

// performOwn takes the job that the reader kept to its store.
func (p *ProtocolRW) performOwn() error {
	in, j := p.own, p.ownJob
	p.own, p.ownJob = nil, job{}
	p.turn.lend()
	in.perform(&j)
	in.finished(&j)
	if !p.turn.takeBack() {
		return errTurnLost
	}
	return nil
}
