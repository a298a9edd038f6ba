package protocol

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"
	"time"
)

// A peer that hangs up has said what it had to say, and it is done: its devices
// are opened and its requests go to the stores, though nobody hears the answers.

// drainTime is how long that may make no progress before the connection ends all
// the same: nothing of it was answered, so the peer knows that it may not be done.
const drainTime = 5 * time.Second

// drainer is the state of it.
type drainer struct {
	on    atomic.Bool   // the peer has hung up
	moved chan struct{} // capacity 1: something was done meanwhile

	// Guarded by ProtocolRW.mu:
	announcing int         // newDevice callbacks that run
	late       *time.Timer // ends a connection that cannot be written, if its reader does not
}

// stir tells the drain, if there is one, that something was done.
func (p *ProtocolRW) stir() {
	if !p.drainer.on.Load() {
		return
	}
	select {
	case p.drainer.moved <- struct{}{}:
	default: // it is going to look anyway
	}
}

// drain waits until what was received is in the stores, for the end, or until
// nothing has been done for drainTime.
func (p *ProtocolRW) drain() {
	p.drainer.on.Store(true) // before the first look: what is done after it stirs
	t := time.NewTimer(drainTime)
	defer t.Stop()
	for p.unfinished() {
		select {
		case <-p.drainer.moved:
			t.Reset(drainTime)
		case <-t.C:
			return
		case <-p.done:
			return
		}
	}
}

// unfinished says whether something that was received waits for a store, or is
// on its way to it. For a device that nobody takes nothing does, unless somebody
// is just being told of one.
func (p *ProtocolRW) unfinished() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drainer.announcing > 0 {
		return true
	}
	for _, d := range p.devices {
		if d.in != nil && d.in.unfinished() {
			return true
		}
	}
	return false
}

func (in *incoming) unfinished() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || in.turnedAway || in.info == nil || in.factory == nil {
		return false
	}
	return !in.opened || in.running+in.jobs.n > 0
}

// writeFailed ends the connection and returns why it ended, or nil if there is
// something to be done first for a peer that does not listen any more.
func (p *ProtocolRW) writeFailed(err error) error {
	err = fmt.Errorf("write: %w", err)
	if p.deafPeer(err) {
		return nil
	}
	p.end(err)
	<-p.done
	return p.err
}

// deafPeer says whether a write failed because the peer has gone, while what it has
// said is not all done. From then on nothing is written. If it was not read to
// its end yet, that must not take longer than drainTime.
func (p *ProtocolRW) deafPeer(err error) bool {
	draining := p.drainer.on.Load()
	if !draining && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, io.ErrClosedPipe) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return false
	}
	if !draining {
		if !p.receivesLocked() {
			return false
		}
		if p.drainer.late == nil {
			p.drainer.late = time.AfterFunc(drainTime, func() {
				if !p.drainer.on.Load() {
					p.end(err)
				}
			})
		}
	}
	p.sender.deaf.Store(true)
	return true
}

// unheard returns why the connection ended, at its end, if nothing is written any
// more. It is for packets without an answer that could tell.
func (p *ProtocolRW) unheard() error {
	if !p.sender.deaf.Load() {
		return nil
	}
	<-p.done
	return p.err
}

// receivesLocked says whether a device is the peer's.
func (p *ProtocolRW) receivesLocked() bool {
	for _, d := range p.devices {
		if d.in != nil {
			return true
		}
	}
	return false
}
