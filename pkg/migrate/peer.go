package migrate

import (
	"errors"
	"fmt"
	"sync"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
)

// LastPeer is what a source knows of the destination's device that it met last, or
// that it handed the disk off to. Steps counts those that were answered since Epoch
// was confirmed.
type LastPeer struct {
	Owner
	Met     bool   // a destination has been met, so that blocks may be there
	Pending uint32 // steps that the device was asked for since and that were not answered
}

// peerRecord holds the LastPeer of a disk.
type peerRecord struct {
	mu sync.Mutex // never held over I/O
	// Guarded by mu:
	last  LastPeer
	owned bool // the disk was handed off to it
	// keep, if not nil, is called with each change before it is acted upon; mu is held.
	keep func(LastPeer)
}

func (r *peerRecord) get() (last LastPeer, owned bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last, r.owned
}

func (r *peerRecord) change(do func(p *LastPeer)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	do(&r.last)
	if r.keep != nil {
		r.keep(r.last)
	}
}

// confirm notes that o is the device of this connection, in the state that o names.
func (r *peerRecord) confirm(o Owner) {
	r.change(func(p *LastPeer) { *p = LastPeer{Owner: o, Met: true} })
}

// recall takes what an earlier process knew, unless more is known already.
func (r *peerRecord) recall(last LastPeer, owned bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if owned || r.last.Owner.Device != last.Device || r.last.Epoch != last.Epoch {
		r.last = last
	}
	r.owned = owned
}

// own notes that the disk was handed off to the device. taken means that it is live.
func (r *peerRecord) own(taken bool) {
	r.mu.Lock()
	r.owned = true
	r.mu.Unlock()
	if taken {
		r.change(func(p *LastPeer) { p.Taken = true })
	}
}

// step asks the device for a step by do, which returns nil when it was answered. A
// step that was sent and not answered may have been made or not.
func (r *peerRecord) step(do func() error) error {
	r.change(func(p *LastPeer) { p.Pending++ })
	if err := do(); err != nil {
		return err
	}
	r.change(func(p *LastPeer) { p.Pending--; p.Steps++ })
	return nil
}

// owner is what a Ledger is to know of the device.
func (r *peerRecord) owner() Owner {
	last, _ := r.get()
	return last.Owner
}

// told is what a destination says of its device; plain if it says nothing, as a Silo
// one and one of ours that knows no handoff.
type told struct {
	wire.Extension
	plain bool
}

func toldBy(ext wire.Extension, extended bool) told {
	return told{Extension: ext, plain: !extended || ext.Device == (Device{})}
}

// device is the device's UUID, or what stands for none.
func (t told) device() Device {
	if t.plain {
		return unnamed
	}
	return t.Device
}

// owner is the device in the state that it is in.
func (t told) owner() Owner {
	return Owner{Device: t.device(), Epoch: t.Epoch.Now, Taken: t.Live && !t.plain}
}

// Why a device is not the one that was met last, in the state that it was in.
var (
	errOtherDevice = errors.New("it is another destination")
	errOtherState  = errors.New("it is an older state of that destination, or a copy of it")
	errNotLive     = fmt.Errorf("%w: the destination was live, and this one is not", errOtherState)
	errPlainPeer   = fmt.Errorf("%w, a plain Silo one", errOtherDevice)
)

// same returns nil if the device that t tells of is the one of p, in the state in
// which the source believes it to be.
func (p LastPeer) same(t told) error {
	switch {
	case t.plain && p.Device != unnamed:
		return errPlainPeer
	case t.device() != p.Device:
		return errOtherDevice
	case p.Epoch == 0: // it had none, or is plain: it is known by its device alone
		return nil
	case t.Epoch.Before != p.Epoch, t.Epoch.Steps-p.Steps > p.Pending:
		return errOtherState
	}
	return nil
}

// owns returns nil if the device that t tells of is the owner that p is.
func (p LastPeer) owns(t told) error {
	if err := p.same(t); err != nil {
		return err
	}
	if p.Taken && p.Epoch != 0 && !t.Live {
		return errNotLive
	}
	return nil
}
