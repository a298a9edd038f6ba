package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol"
)

// flight is one packet that was sent and not answered.
type flight struct {
	pump   *pump
	span   span
	demand bool
	hole   bool // a zero run of a hole
	early  bool // sent before the other side had said that it wants checksums
	mark   flightMark
}

// sent takes the result of sending; if it failed nobody will call Complete.
func (f *flight) sent(err error) error {
	if err != nil {
		f.land(false)
	}
	return err
}

// Complete takes the answer: the blocks are settled, or tried again.
func (f *flight) Complete(err error) {
	p, s, early := f.pump, f.span, f.early
	f.land(err == nil)
	var refused *protocol.RemoteError
	switch {
	case err == nil:
		p.greeted()
		p.counts.taken.Add(1)
		p.order.done(s)
	case errors.Is(err, protocol.ErrNoRoom):
		p.greeted()
		p.order.noRoom(s, time.Now())
	case errors.As(err, &refused) && refused.Damaged && early: // it had no checksum yet
		p.greeted()
		p.order.again(s)
	case errors.As(err, &refused) && refused.Damaged:
		p.greeted()
		p.again(s)
	case errors.As(err, &refused):
		p.greeted()
		off, length := p.order.geo.bytes(s)
		// The error, if it is the last, reaches the loops through p.failed.
		_ = p.retry(s, fmt.Errorf("the destination refused %d bytes at %d (its log says why): %w", length, off, err))
	default:
		// The connection is gone, and this order with it.
	}
}

// land gives back what takeOff took.
func (f *flight) land(ok bool) {
	p := f.pump
	if f.demand {
		<-p.demandSlots
		if p.demandOut.Add(-1) == 0 {
			notify(p.demandLanded)
		}
	} else {
		p.window.release(f.mark, ok)
	}
	if f.hole {
		p.holeLanded(time.Since(f.mark.sentAt))
	}
	p.flights.Put(f)
}

// retry puts s back, to be tried again later; its error is the disk's when it
// has been tried often enough.
func (p *pump) retry(s span, err error) error {
	if p.order.failed(s, time.Now()) {
		return nil
	}
	var refused *protocol.RemoteError
	peer := errors.As(err, &refused)
	return p.end(&DiskError{Name: p.disk.Name, Err: fmt.Errorf("gave up after %d tries: %w", maxAttempts, err), Peer: peer})
}

// fail ends the disk with err, which is our own.
func (p *pump) fail(err error) error { return p.end(&DiskError{Name: p.disk.Name, Err: err}) }

// end keeps the first error of the disk, and returns it.
func (p *pump) end(err *DiskError) error {
	p.failOnce.Do(func() {
		p.err = err
		close(p.failed)
	})
	<-p.failed
	return p.err
}

// cause is why the disk was not moved, if a loop ended with err: its own error,
// rather than what became of the connection.
func (p *pump) cause(err error) error {
	select {
	case <-p.failed:
		return p.err
	default:
		return err
	}
}

// DiskError means that one disk cannot be moved over this connection.
type DiskError struct {
	Name string
	Err  error
	Peer bool // the other side does not take it; else it is this side's disk that fails
}

func (e *DiskError) Error() string { return fmt.Sprintf("disk %s: %v", e.Name, e.Err) }

func (e *DiskError) Unwrap() error { return e.Err }
