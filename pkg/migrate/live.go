package migrate

import (
	"crypto/rand"
	"errors"
	"fmt"
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
	return nil
}

// name gives a disk without an identity one for the life of this process: whether its
// contents are still the same is not known of a later process, so no two have the
// same name.
func (d *SourceDisk) name() {
	if d.Identity == (Identity{}) {
		_, _ = rand.Read(d.Identity.UUID[:]) // never fails
		d.Identity.Generation = 1
	}
}

// record is where it is kept who has the disk.
func (d *SourceDisk) record() *peerRecord {
	if d.Live != nil {
		return &d.Live.record
	}
	return new(peerRecord)
}

// recall takes from the ledger what is known of the destination.
func (s *Source) recall() error {
	for _, d := range s.disks {
		owner, owned := s.opts.Ledger.Owner(d.Name)
		switch {
		case owned && d.stillWritten():
			return fmt.Errorf("migrate: disk %s was handed off: it cannot be served here", d.Name)
		case !owned && d.Live != nil && d.Live.HandedOff():
			owner, owned = Owner{Device: d.Live.handedTo()}, true
		}
		if owned {
			d.peer.recall(LastPeer{Owner: owner, Met: true, Pending: unnotedSteps(d.geo.blocks)}, true)
		} else if last, ok := s.opts.Ledger.Peer(d.Name); ok {
			d.peer.recall(LastPeer{Owner: last, Met: d.Live != nil && d.Live.goesOn()}, false)
		}
	}
	return nil
}

// unnotedSteps is how many steps a device may have made since the ledger was told of it
// at Prepare: the dirty lists of what was written while that took its time, of every
// block at most, and PostLock, which may have come twice.
func unnotedSteps(blocks int64) uint32 {
	return uint32(min((blocks+maxListed-1)/maxListed+2, math.MaxInt32))
}

// stillWritten says that the disk is used here.
func (d *sourceDisk) stillWritten() bool { return d.Live != nil && !d.Live.HandedOff() }

// extension is what we say of the disk beyond Silo.
func (d *sourceDisk) extension() *wire.Extension {
	last, owned := d.peer.get()
	e := &wire.Extension{Revision: wire.Revision, Identity: d.Identity, Epoch: wire.Epoch{Now: last.Epoch}}
	switch {
	case d.stillWritten():
		e.Live = true
	case owned:
		e.Device = last.Device
	case d.clone:
		e.Clone = true
	default:
		e.Hold = true
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

// noteTaken makes it durable that the disks that were handed off are live at the
// destination, when all of them are.
func (s *Source) noteTaken() {
	gone := 0
	for _, d := range s.disks {
		last, owned := d.peer.get()
		if owned && !last.Taken {
			return
		}
		if owned {
			gone++
		}
	}
	if gone == 0 {
		return
	}
	if s.HandedOff() {
		s.hand.confirm()
	}
	if s.takenNoted.Load() {
		return
	}
	if err := s.tellTaken(); err != nil {
		s.log.Warn("it cannot be noted that the disks are in use at the destination: it will be tried again on the next connection", "error", err)
		return
	}
	s.takenNoted.Store(true)
}

// tellTaken tells the ledger of the owners in the state in which they went live: the
// steps that came after Prepare are not in it yet.
func (s *Source) tellTaken() error {
	for _, d := range s.disks {
		if last, owned := d.peer.get(); owned {
			if err := s.opts.Ledger.Confirm(d.Name, last.Owner); err != nil {
				return err
			}
		}
	}
	return s.opts.Ledger.Taken()
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
	dest, connected := s.hand.destination()
	for i, d := range s.disks {
		all[i] = d.status(p)
		if connected && all[i].Connected {
			all[i].Address = dest.at
			if dest.devices[i] != unnamed {
				all[i].Device = dest.devices[i]
			}
		}
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
		st.Err = ErrFull
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
	d.comparing.status(&st)
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
