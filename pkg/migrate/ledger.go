package migrate

import "sync"

// Owner is a destination's device, and what was last confirmed of it.
type Owner struct {
	Device Device
	// Epoch is the last one that was confirmed of the device. 0: none, as of a peer
	// before wire.RevisionEpoch and of a plain Silo one.
	Epoch uint64
	// Steps is what the device said with that epoch.
	Steps uint32
	// Taken means that the destination has answered PostLock: it is live.
	Taken bool
}

// Ledger keeps, also over a crash, to which destination the disks of a source
// belong. Disks go by their names. The methods are called one at a time.
type Ledger interface {
	// Owner returns to which device the disk was handed off; ok is false if it is
	// this side's.
	Owner(disk string) (o Owner, ok bool)
	// Peer returns the device that was met last, and the epoch that was confirmed of
	// it. It is Owner's of a disk that was handed off.
	Peer(disk string) (o Owner, ok bool)
	// Confirm makes durable which device was met and the epoch of it that the source
	// now knows. It is called before anything that the device claims is believed, and
	// before anything is sent to it. Of a disk that was handed off o.Device is the
	// owner's.
	Confirm(disk string, o Owner) error
	// Prepare stages and syncs what HandOff will publish, while the disks are still
	// written. If there is no room it shows here, and nothing has happened. A Prepare
	// that no HandOff follows is void.
	Prepare(to map[string]Owner) error
	// HandOff makes it durable that the disks of Prepare belong to the owners named
	// there: all of them or none, also if the power goes meanwhile. It is called
	// before the destination is told, and before anything is served there.
	HandOff() error
	// TakeBack makes it durable that the disks are still ours, after HandOff failed,
	// or finds that nothing had been published. The destination was not told.
	TakeBack() error
	// Taken makes it durable that the destination has answered: from now on only a
	// device that is live is the owner.
	Taken() error
	// Complete makes it durable that everything is at the destination: a source that
	// is started again has nothing to do.
	Complete() error
}

// noLedger keeps all of it in memory, so that it holds within a process.
type noLedger struct {
	mu sync.Mutex
	// Guarded by mu:
	peers  map[string]Owner
	owners map[string]Owner
	staged map[string]Owner
}

// Owner implements Ledger.
func (l *noLedger) Owner(disk string) (Owner, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o, ok := l.owners[disk]
	return o, ok
}

// Peer implements Ledger.
func (l *noLedger) Peer(disk string) (Owner, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if o, ok := l.owners[disk]; ok {
		return o, true
	}
	o, ok := l.peers[disk]
	return o, ok
}

// Confirm implements Ledger.
func (l *noLedger) Confirm(disk string, o Owner) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, gone := l.owners[disk]; gone {
		l.owners[disk] = o
		return nil
	}
	if l.peers == nil {
		l.peers = make(map[string]Owner)
	}
	l.peers[disk] = o
	return nil
}

// Prepare implements Ledger.
func (l *noLedger) Prepare(to map[string]Owner) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.staged = to
	return nil
}

// HandOff implements Ledger.
func (l *noLedger) HandOff() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owners == nil {
		l.owners = make(map[string]Owner)
	}
	for disk, o := range l.staged {
		l.owners[disk] = o
	}
	return nil
}

// TakeBack implements Ledger.
func (l *noLedger) TakeBack() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for disk := range l.staged {
		delete(l.owners, disk)
	}
	return nil
}

// Taken implements Ledger.
func (l *noLedger) Taken() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for disk, o := range l.owners {
		o.Taken = true
		l.owners[disk] = o
	}
	return nil
}

// Complete implements Ledger.
func (l *noLedger) Complete() error { return nil }

// unnamed is the owner of a disk that was handed off to a destination which has
// no name for its device, as a plain Silo one: no other one has this name.
var unnamed = Device{
	0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
}
