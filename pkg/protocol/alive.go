package protocol

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

const (
	// aliveEvery is how often we say that we are there, to a peer that knows it.
	aliveEvery = 4 * time.Second
	// silentAfter is how long such a peer may say nothing while we listen.
	silentAfter = 12 * time.Second
)

// ErrSilent says that a peer which promised to say something every few seconds
// has not: it, or the network, is gone without a word.
var ErrSilent = errors.New("nothing was heard from the peer for " + silentAfter.String())

// lifeline reads, and notices when nothing comes. Only time in which somebody
// listens counts: while we have no memory for more it is we who are silent. Any
// byte counts, so a slow one is not mistaken for a dead one.
type lifeline struct {
	r    io.Reader
	gone func()

	mu sync.Mutex // never held while reading or calling out
	// Guarded by mu:
	timer *time.Timer // nil: the peer has promised nothing
	since time.Time   // when the Read in progress began; zero if none is
}

// Read reads, with the contract of io.Reader.
func (l *lifeline) Read(b []byte) (int, error) {
	l.begin(time.Now())
	n, err := l.r.Read(b)
	l.begin(time.Time{})
	return n, err
}

// begin notes that a Read begins, or with a zero time that one has ended.
func (l *lifeline) begin(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since = now
	switch {
	case l.timer == nil:
	case now.IsZero():
		l.timer.Stop()
	default:
		l.timer.Reset(silentAfter)
	}
}

// watch begins to expect something every few seconds. It says whether it is the
// first to be called.
func (l *lifeline) watch() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		return false
	}
	if !l.since.IsZero() {
		l.since = time.Now() // nothing was promised for the time before
	}
	l.timer = time.AfterFunc(silentAfter, l.fire)
	return true
}

// fire ends the connection if what the timer was set for is still so.
func (l *lifeline) fire() {
	l.mu.Lock()
	silent := !l.since.IsZero() && time.Since(l.since) >= silentAfter
	l.mu.Unlock()
	if silent {
		l.gone()
	}
}

// bond makes both sides say now and then that they are there, by the name of dev:
// ext is what the peer says about itself. It is called when the peer knows that
// we know.
func (p *ProtocolRW) bond(dev uint32, ext *wire.Extension) {
	if ext == nil || ext.Revision < wire.RevisionAlive || !p.life.watch() {
		return
	}
	p.start(func() { p.aliveLoop(dev) })
}

// aliveLoop says that we are there until the connection ends. It may have to
// wait for the socket; what holds it is then being sent.
func (p *ProtocolRW) aliveLoop(dev uint32) {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if p.outbox.send(dev, p.calls.id(), []byte{byte(wire.CommandAlive)}, false) != nil {
				return // the connection has ended and has its reason
			}
		case <-p.done:
			return
		}
	}
}
