package migrate

import (
	"context"
	"crypto/rand"
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// live completes what is said of a live disk.
func (d *SourceDisk) live() error {
	if d.Live == nil {
		return nil
	}
	switch d.Store {
	case nil:
		d.Store = d.Live.store
	case d.Live.store:
	default:
		return errors.New("its Tracker is for another storage")
	}
	if d.Identity == (Identity{}) {
		// What was copied from an earlier process is out of date. No two of them
		// have the same name.
		_, _ = rand.Read(d.Identity.UUID[:]) // never fails
		d.Identity.Generation = 1
	}
	return nil
}

// stillWritten says that the disk is used here.
func (d *sourceDisk) stillWritten() bool { return d.Live != nil && !d.Live.HandedOff() }

// extension is what we say of the disk beyond Silo.
func (d *sourceDisk) extension() *wire.Extension {
	e := &wire.Extension{Revision: wire.Revision, Identity: d.Identity}
	switch {
	case d.stillWritten():
		e.Live = true
	case d.Live != nil:
		e.Device = d.Live.handedTo()
	}
	return e
}

func (s *Source) hasLive() bool {
	_, live := s.handedOff()
	return live > 0
}

// handedOff counts the live disks, and those of them that were handed off.
func (s *Source) handedOff() (gone, live int) {
	for _, d := range s.disks {
		if d.Live == nil {
			continue
		}
		live++
		if d.Live.HandedOff() {
			gone++
		}
	}
	return gone, live
}

// HandedOff says that the live disks belong to the destination: from the moment
// on in which it may know.
func (s *Source) HandedOff() bool {
	gone, live := s.handedOff()
	return live > 0 && gone == live
}

// takenLoop waits for the destination of a disk that was handed off on an
// earlier connection: it answers DevInfo when the disk is live there.
func (s *Source) takenLoop(ctx context.Context, c *line) error {
	if c.disk.Live == nil || c.disk.stillWritten() {
		return nil
	}
	select {
	case <-c.to.PeerKnown():
		s.taken(c.disk)
	case <-ctx.Done():
	}
	return nil
}

// taken notes that the disk, if it was handed off, is live at the destination.
func (s *Source) taken(d *sourceDisk) {
	if d.Live == nil || d.stillWritten() {
		return
	}
	d.mu.Lock()
	d.taken = true
	d.mu.Unlock()
	for _, d := range s.disks {
		if d.Live != nil && !d.isTaken() {
			return
		}
	}
	s.hand.confirm()
}

func (d *sourceDisk) isTaken() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.taken
}

// passes is how far the passes of the live disks are.
type passes struct {
	pass  int // from 1, on this connection; 0: there was none
	first bool
	gains bool    // the last pass left less than the one before
	link  float64 // bytes a second
}

func (s *Source) note(change func(p *passes)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.progress)
}

func (s *Source) passes() passes {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.progress
}

// Status returns the progress of each disk, in the order of NewSource.
func (s *Source) Status() []DiskStatus {
	all := make([]DiskStatus, len(s.disks))
	p := s.passes()
	for i, d := range s.disks {
		all[i] = d.status(p)
	}
	return all
}

func (d *sourceDisk) status(p passes) DiskStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := DiskStatus{
		Name: d.Name, Size: d.geo.size, BlockSize: d.geo.blockSize,
		State:      StateWaiting,
		BytesDone:  max(0, d.geo.size-d.order.unsettled()*d.geo.blockSize),
		BytesAsked: d.counts.asked.Load(), // before BytesSent, which is never less
		BytesSent:  d.counts.sent.Load(),
		Damaged:    d.counts.damage.count(),
		Connected:  d.connected, Reconnects: max(0, d.reconnects), Err: d.err,
	}
	if _, full := d.order.full(); full && d.connected {
		st.Err = errNoRoom
	}
	if d.Live != nil {
		d.liveStatus(&st, p)
	}
	switch {
	case d.complete:
		st.State, st.BytesDone, st.ETA = StateComplete, d.geo.size, 0
	case !d.connected:
		st.State = StateWaiting
	case d.Live == nil:
		st.State = StateMigrating
	}
	return st
}

func (d *sourceDisk) liveStatus(st *DiskStatus, p passes) {
	st.Pass, st.LinkRate = p.pass, p.link
	if d.Live.HandedOff() {
		st.State = StateHandedOff
		st.ETA = eta(st.Size-st.BytesDone, st.LinkRate)
		return
	}
	if dirt := d.Live.dirt.Load(); dirt != nil {
		st.DirtyBytes, st.WriteRate = min(st.Size, dirt.bytes()), d.rate.get()
	}
	switch {
	case p.first:
		st.State = StateFirstPass
		st.ETA = eta(st.Size-st.BytesDone, st.LinkRate)
	case p.gains:
		st.State = StateConverging
		st.ETA = eta(st.Size-st.BytesDone, st.LinkRate-st.WriteRate)
	default:
		st.State = StateNotConverging
	}
}

// eta is how long bytes take at rate bytes a second; 0 if that is not known.
func eta(bytes int64, rate float64) time.Duration {
	if rate <= 0 {
		return 0
	}
	return time.Duration(min(float64(bytes)/rate, 1e9) * float64(time.Second))
}

// speed is a rate in bytes a second that forgets slowly.
type speed struct{ bits atomic.Uint64 }

// add notes the rate of the last period; one goroutine does.
func (s *speed) add(rate float64) {
	s.bits.Store(math.Float64bits((s.get() + rate) / 2))
}

func (s *speed) get() float64 { return math.Float64frombits(s.bits.Load()) }
